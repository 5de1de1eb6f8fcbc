package store

import (
	"context"

	"strongroom/internal/errs"
)

// Format is what a release must know to use a database: records in a form of their
// own, or whole tables, that an older release would misread or leave out
// (docs/spec/database-format.md).
type Format struct {
	Version int    `json:"version"`
	Release string `json:"release"` // that raised it
}

const (
	formatTable = "format"
	formatKey   = "database"
)

func (tx *Tx) formats() TxTable[Format] { return NewTable[Format](tx.db, formatTable, 1).In(tx) }

// Format returns the database's format. One that nobody raised is 1.
func (tx *Tx) Format(ctx context.Context) (Format, error) {
	f, err := tx.formats().Get(ctx, formatKey)
	if IsNotFound(err) {
		return Format{Version: 1}, nil
	}
	return f, err
}

// Admit returns an error of kind [errs.InvalidState] unless a release that knows
// formats up to known may use the database. The transaction fails if the format
// is raised meanwhile.
func (tx *Tx) Admit(ctx context.Context, known int) error {
	f, err := tx.Format(ctx)
	if err != nil || f.Version <= known {
		return err
	}
	return errs.New(errs.InvalidState, "the database has format %d, of release %.64s; this release knows formats up to %d", f.Version, f.Release, known).
		WithHint("install release %.64s or a later one; nothing was changed", f.Release)
}

// Raise makes f the database's format, unless it has that already, or a later one.
// Afterwards releases that do not know it are refused: whoever calls it sees to it
// that none of them has the database open.
func (tx *Tx) Raise(ctx context.Context, f Format) error {
	now, err := tx.Format(ctx)
	if err != nil || now.Version >= f.Version {
		return err
	}
	return tx.formats().Put(ctx, formatKey, f)
}
