package pki

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"strings"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/errs"
)

const (
	// DefaultJoinLife and MaxJoinLife bound how long a join token is valid.
	DefaultJoinLife = time.Hour
	MaxJoinLife     = 24 * time.Hour

	joinPrefix  = "strongroom-join-1"
	joinIDLen   = 16 // hex digits
	joinSecret  = 32 // bytes
	maxJoinText = 200
)

// joinRecord is a join token as it is stored.
type joinRecord struct {
	ID      string    `json:"id"`
	Hash    string    `json:"hash"` // SHA-256 of the secret, hex
	Cluster string    `json:"cluster"`
	Expires time.Time `json:"expires"`
}

// JoinToken is what a host needs to join; docs/spec/join-token.md.
type JoinToken struct {
	ID     string // 16 hex digits
	Secret [joinSecret]byte
	CA     Fingerprint
}

// String returns the token's text: it is a secret.
func (t JoinToken) String() string {
	b64 := base64.RawURLEncoding
	return joinPrefix + "." + t.ID + "." + b64.EncodeToString(t.Secret[:]) + "." + b64.EncodeToString(t.CA[:])
}

// ParseJoinToken is the reverse of [JoinToken.String].
func ParseJoinToken(text string) (JoinToken, error) {
	bad := errs.New(errs.Invalid, "this is no join token").WithHint("strongroom host join-token --cluster NAME")
	if len(text) > maxJoinText {
		return JoinToken{}, bad
	}
	f := strings.Split(text, ".")
	if len(f) != 4 || f[0] != joinPrefix || len(f[1]) != joinIDLen || strings.Trim(f[1], "0123456789abcdef") != "" {
		return JoinToken{}, bad
	}
	b64 := base64.RawURLEncoding.Strict()
	secret, err1 := b64.DecodeString(f[2])
	ca, err2 := b64.DecodeString(f[3])
	t := JoinToken{ID: f[1]}
	if err1 != nil || err2 != nil || copy(t.Secret[:], secret) != len(secret) || len(secret) != joinSecret ||
		copy(t.CA[:], ca) != len(ca) || len(ca) != len(t.CA) || t.String() != text {
		return JoinToken{}, bad
	}
	return t, nil
}

// Joins keeps the join tokens that were given out.
type Joins struct {
	db     *store.DB
	tokens *store.Table[joinRecord]
	now    func() time.Time
}

// NewJoins returns the join tokens kept in db.
func NewJoins(db *store.DB) *Joins {
	return &Joins{db: db, tokens: store.NewTable[joinRecord](db, "join-token", 1), now: func() time.Time { return time.Now().UTC() }}
}

// Create makes a token with which one host may join a cluster within life (0:
// an hour).
func (j *Joins) Create(ctx context.Context, clusterID string, life time.Duration, ca Fingerprint) (JoinToken, time.Time, error) {
	if life == 0 {
		life = DefaultJoinLife
	}
	if life < 0 || life > MaxJoinLife || clusterID == "" {
		return JoinToken{}, time.Time{}, errs.New(errs.Invalid, "cannot make join token: it is for a cluster, and lives at most %v", MaxJoinLife)
	}
	var id [joinIDLen / 2]byte
	rand.Read(id[:])
	t := JoinToken{ID: hex.EncodeToString(id[:]), CA: ca}
	rand.Read(t.Secret[:])
	hash := sha256.Sum256(t.Secret[:])
	rec := joinRecord{ID: t.ID, Hash: hex.EncodeToString(hash[:]), Cluster: clusterID, Expires: j.now().Add(life)}
	err := j.db.Txn(ctx, func(tx *store.Tx) error {
		all, err := j.tokens.In(tx).List(ctx, "")
		if err != nil {
			return err
		}
		for _, old := range all { // a good time to tidy up
			if !j.now().Before(old.Expires) {
				if err := j.tokens.In(tx).Delete(ctx, old.ID); err != nil {
					return err
				}
			}
		}
		return j.tokens.In(tx).Create(ctx, rec.ID, rec)
	})
	if err != nil {
		return JoinToken{}, time.Time{}, errs.Wrap(err, "cannot make join token")
	}
	return t, rec.Expires, nil
}

// Check returns what [Joins.Redeem] would, and leaves the token as it is. Who asks
// to join is told nothing of others before it.
func (j *Joins) Check(ctx context.Context, t JoinToken) (clusterID string, err error) {
	err = j.db.View(ctx, func(tx *store.Tx) error {
		rec, err := j.valid(ctx, tx, t)
		clusterID = rec.Cluster
		return err
	})
	return clusterID, errs.Wrap(err, "cannot join")
}

// Redeem uses a token up and returns the id of its cluster. A token that is
// unknown, used or expired gives the same Denied error.
func (j *Joins) Redeem(ctx context.Context, t JoinToken) (clusterID string, err error) {
	err = j.db.Txn(ctx, func(tx *store.Tx) error {
		rec, err := j.valid(ctx, tx, t)
		if err != nil {
			return err
		}
		clusterID = rec.Cluster
		return j.tokens.In(tx).Delete(ctx, t.ID)
	})
	if err != nil {
		return "", errs.Wrap(err, "cannot join")
	}
	return clusterID, nil
}

// valid returns the record of a token with which somebody may join now.
func (j *Joins) valid(ctx context.Context, tx *store.Tx, t JoinToken) (joinRecord, error) {
	denied := errs.New(errs.Denied, "the join token is unknown, used or expired").
		WithHint("make a new one: strongroom host join-token --cluster NAME")
	rec, err := j.tokens.In(tx).Get(ctx, t.ID)
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrInvalidKey) {
		return joinRecord{}, denied
	}
	if err != nil {
		return joinRecord{}, err
	}
	hash := sha256.Sum256(t.Secret[:])
	if subtle.ConstantTimeCompare([]byte(hex.EncodeToString(hash[:])), []byte(rec.Hash)) != 1 || !j.now().Before(rec.Expires) {
		return joinRecord{}, denied
	}
	return rec, nil
}
