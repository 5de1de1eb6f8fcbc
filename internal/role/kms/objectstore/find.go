package objectstore

import (
	"fmt"
	"iter"
	"slices"
	"time"

	"strongroom/internal/control/store"
	"strongroom/internal/keys/kmip/kmipserver"
)

// Find implements [kmipserver.Reader].
func (v *view) Find(q kmipserver.Query) iter.Seq2[*kmipserver.Object, error] {
	if q.Name != "" {
		return v.named(q)
	}
	return func(yield func(*kmipserver.Object, error) bool) {
		done := false
		look := func(e store.Entry[[]byte]) bool {
			o, err := v.describe(e)
			if err == nil && !q.IsDue(o) {
				return true
			}
			done = !yield(o, err) || err != nil
			return !done
		}
		indexed, err := false, error(nil)
		if !q.Due.IsZero() {
			indexed, err = v.s.dates.isComplete(v.ctx, v.tx)
		}
		switch {
		case err != nil:
		case indexed:
			err = v.due(q.Due, look)
		case q.Newest:
			err = v.newestFirst(q.After, look)
		default:
			prefix := accountPrefix(v.account)
			from := prefix
			if q.After != "" {
				from = prefix + q.After + "\x00"
			}
			err = v.s.objects.In(v.tx).ScanBetween(v.ctx, from, prefix+beyondID, look)
		}
		if err != nil && !done {
			yield(nil, err)
		}
	}
}

// describe opens a record without keeping its material.
func (v *view) describe(e store.Entry[[]byte]) (*kmipserver.Object, error) {
	id := e.Key[len(accountPrefix(v.account)):]
	o, _, err := unseal(v.s.ring, v.account, id, e.Value)
	if err != nil {
		return nil, fmt.Errorf("object %s: %w", id, err)
	}
	o.Material.Close()
	o.Material = nil
	return o, nil
}

const (
	// beyondID is greater than any identifier.
	beyondID = "g"
	// A span of time whose records are read, to be given out in reverse, should
	// have so many, and no more than so many bytes.
	windowMin, windowMax = 64, 512
	windowBytes          = 8 << 20
	windowFirst          = time.Minute
)

// newestFirst calls f with the account's records whose identifiers are less than
// before, or all if that is "", in descending order, until f returns false. The
// database gives ranges in ascending order only; but identifiers begin with the
// time of their creation, so it is asked for one span of time after the other,
// each as long as the density of the last suggests.
func (v *view) newestFirst(before string, f func(store.Entry[[]byte]) bool) error {
	prefix := accountPrefix(v.account)
	end, to := milliseconds(time.Now()), beyondID
	if before != "" {
		end, to = timeOf(before), before
	}
	for span := windowFirst.Milliseconds(); ; {
		begin, from := max(0, end-span), ""
		if begin > 0 {
			from = firstID(begin)
		}
		var window []store.Entry[[]byte]
		size, full := 0, false
		err := v.s.objects.In(v.tx).ScanBetween(v.ctx, prefix+from, prefix+to, func(e store.Entry[[]byte]) bool {
			window, size = append(window, e), size+len(e.Value)
			full = span > 1 && (len(window) > windowMax || size > windowBytes)
			return !full
		})
		if err != nil {
			return err
		}
		if full {
			span = max(1, span/4)
			continue
		}
		for _, e := range slices.Backward(window) {
			if !f(e) {
				return nil
			}
		}
		if begin == 0 {
			return nil
		}
		if len(window) < windowMin {
			span *= 4
		}
		end, to = begin, from
	}
}

// milliseconds is t as it stands in an identifier, of 48 bits.
func milliseconds(t time.Time) int64 { return min(max(t.UnixMilli(), 0), 1<<48-1) }

// firstID returns the least identifier of that millisecond, cut short.
func firstID(ms int64) string { return fmt.Sprintf("%08x-%04x", ms>>16, ms&0xffff) }

// timeOf is the reverse of firstID: the millisecond of an identifier.
func timeOf(id string) int64 {
	var high, low int64
	fmt.Sscanf(id, "%08x-%04x", &high, &low)
	return high<<16 | low
}

// named finds by the index, which it makes part of what the transaction
// depends on: a name that another takes meanwhile is noticed.
func (v *view) named(q kmipserver.Query) iter.Seq2[*kmipserver.Object, error] {
	return func(yield func(*kmipserver.Object, error) bool) {
		ids, err := v.s.names.find(v.ctx, v.tx, v.account, q.Name)
		if err != nil {
			yield(nil, err)
			return
		}
		if q.Newest {
			slices.Reverse(ids)
		}
		for _, id := range ids {
			if !q.Passes(id) {
				continue
			}
			e, err := v.open(id)
			if err != nil {
				yield(nil, err)
				return
			}
			if !slices.Contains(namesOf(e.object), q.Name) { // the hash of another is the same
				continue
			}
			o := copyOf(e.object)
			o.Material = nil
			if !yield(o, nil) {
				return
			}
		}
	}
}
