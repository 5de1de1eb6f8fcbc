package objectstore

import (
	"strongroom/internal/control/store"
	"strongroom/internal/keys/kmip/kmipserver"
)

// TxOf returns the database transaction that a transaction of a [Store] is, so
// that something else is changed with the objects, or not at all. It is nil for
// one of another store.
func TxOf(t kmipserver.Reader) *store.Tx {
	switch t := t.(type) {
	case *view:
		return t.tx
	case *update:
		return t.tx
	}
	return nil
}
