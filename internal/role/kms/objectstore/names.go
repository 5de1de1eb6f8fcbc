package objectstore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/google/uuid"

	"strongroom/internal/control/store"
)

const (
	bucketVersion = 1
	nameEntry     = 8 + 16 // bytes: of a hash, and an identifier

	// foldBatch is how many entries of their own one transaction folds.
	foldBatch = 512
)

// names finds objects by their names (docs/spec/kms-object.md): in buckets, for
// each key of the database costs memory as long as it is open. A name that was
// restored, or written by an early release, has an entry of its own until
// [names.fold] has put it into its bucket.
type names struct {
	db      *store.DB
	buckets *store.Table[[]byte]
	loose   *store.Table[[]byte]
	// folded says that there are no entries of their own.
	folded *atomic.Bool
}

func newNames(db *store.DB) names {
	return names{db: db, buckets: store.NewRawTable(db, "kms-names"), loose: store.NewRawTable(db, "kms-name"), folded: &atomic.Bool{}}
}

// loosePrefix is where the entries of a name begin that are their own.
func loosePrefix(account, name string) string {
	sum := sha256.Sum256([]byte(name))
	return accountPrefix(account) + hex.EncodeToString(sum[:16]) + "/"
}

// place returns the bucket of a name, and how the name's entries begin there.
func place(account, name string) (bucket string, hash []byte) {
	sum := sha256.Sum256([]byte(name))
	return accountPrefix(account) + hex.EncodeToString(sum[:2]), sum[2:10]
}

// entriesOf returns the entries of a bucket that begin with hash, which alias it.
func entriesOf(bucket, hash []byte) []byte {
	begin, _ := searchBucket(bucket, hash)
	end := begin
	for end < len(bucket) && bytes.HasPrefix(bucket[end:], hash) {
		end += nameEntry
	}
	return bucket[begin:end]
}

// searchBucket returns where entry is in a bucket, or belongs.
func searchBucket(bucket, entry []byte) (at int, found bool) {
	low, high := 0, (len(bucket)-1)/nameEntry
	for low < high {
		mid := (low + high) / 2
		if bytes.Compare(bucket[1+mid*nameEntry:][:nameEntry], entry) < 0 {
			low = mid + 1
		} else {
			high = mid
		}
	}
	at = 1 + low*nameEntry
	return at, at < len(bucket) && bytes.Equal(bucket[at:][:nameEntry], entry)
}

func checkBucket(key string, b []byte) error {
	if len(b) < 1+nameEntry || (len(b)-1)%nameEntry != 0 {
		return fmt.Errorf("names %s: %w", key, errCorrupt)
	}
	if b[0] != bucketVersion {
		return fmt.Errorf("names %s: %w: version %d", key, errVersion, b[0])
	}
	return nil
}

// bucket returns what a transaction sees of one: nothing but a version if there
// is none.
func (n names) bucket(ctx context.Context, tx *store.Tx, key string) ([]byte, error) {
	b, err := n.buckets.In(tx).Get(ctx, key)
	if store.IsNotFound(err) {
		return []byte{bucketVersion}, nil
	}
	if err == nil {
		err = checkBucket(key, b)
	}
	return b, err
}

// find returns the identifiers of the objects that may have a name, in ascending
// order, and makes them part of what the transaction depends on.
func (n names) find(ctx context.Context, tx *store.Tx, account, name string) ([]string, error) {
	key, hash := place(account, name)
	bucket, err := n.bucket(ctx, tx, key)
	if err != nil {
		return nil, err
	}
	var ids []string
	for e := range slices.Chunk(entriesOf(bucket, hash), nameEntry) {
		ids = append(ids, uuid.UUID(e[8:]).String())
	}
	if n.folded.Load() {
		return ids, nil
	}
	prefix := loosePrefix(account, name)
	loose, err := n.loose.In(tx).Entries(ctx, prefix)
	if err != nil || len(loose) == 0 {
		return ids, err
	}
	for _, e := range loose {
		ids = append(ids, e.Key[len(prefix):])
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// add has an object found by a name.
func (n names) add(ctx context.Context, tx *store.Tx, account, name, id string) error {
	key, hash := place(account, name)
	return n.insert(ctx, tx, key, hash, id)
}

func (n names) insert(ctx context.Context, tx *store.Tx, key string, hash []byte, id string) error {
	bucket, err := n.bucket(ctx, tx, key)
	if err != nil {
		return err
	}
	entry := entryOf(hash, id)
	at, found := searchBucket(bucket, entry)
	if found {
		return nil
	}
	return n.buckets.In(tx).Set(key, slices.Insert(slices.Clone(bucket), at, entry...))
}

// entryOf returns the entry of an object whose identifier is one of this KMS.
func entryOf(hash []byte, id string) []byte {
	u := uuid.MustParse(id)
	return append(slices.Clone(hash), u[:]...)
}

// remove has an object no longer found by a name.
func (n names) remove(ctx context.Context, tx *store.Tx, account, name, id string) error {
	if !n.folded.Load() {
		if err := n.loose.In(tx).Delete(ctx, loosePrefix(account, name)+id); err != nil && !store.IsNotFound(err) {
			return err
		}
	}
	key, hash := place(account, name)
	bucket, err := n.bucket(ctx, tx, key)
	if err != nil {
		return err
	}
	at, found := searchBucket(bucket, entryOf(hash, id))
	switch {
	case !found:
		return nil
	case len(bucket) == 1+nameEntry:
		return n.buckets.In(tx).Delete(ctx, key)
	}
	return n.buckets.In(tx).Set(key, slices.Delete(slices.Clone(bucket), at, at+nameEntry))
}

// fold puts entries of their own into their buckets, until there are none. It may
// be broken off at any point and repeated, and done by several nodes at once.
func (n names) fold(ctx context.Context) error {
	for {
		entries, err := n.loose.Scan(ctx, store.Range{Limit: foldBatch})
		if err != nil {
			return err
		}
		if len(entries) == 0 {
			n.folded.Store(true)
			return nil
		}
		if err := n.foldSome(ctx, entries); err != nil {
			return err
		}
	}
}

func (n names) foldSome(ctx context.Context, entries []store.Entry[[]byte]) error {
	return n.db.Txn(ctx, func(tx *store.Tx) error {
		for _, e := range entries {
			// Another node may have been quicker, and the object may have lost the name.
			err := n.loose.In(tx).Delete(ctx, e.Key)
			if store.IsNotFound(err) {
				continue
			}
			if err != nil {
				return err
			}
			account, rest, _ := strings.Cut(e.Key, "/")
			digits, id, _ := strings.Cut(rest, "/")
			hash, err := hex.DecodeString(digits)
			if err != nil || len(hash) != 16 || !isID(id) {
				return fmt.Errorf("name %s: %w", e.Key, errCorrupt)
			}
			if err := n.insert(ctx, tx, account+"/"+digits[:4], hash[2:10], id); err != nil {
				return err
			}
		}
		return nil
	})
}
