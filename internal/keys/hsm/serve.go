package hsm

import (
	"io"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

// Operation is what the child does with a module. PIN and data are the request's
// and must not be kept.
type Operation func(k Key, pin, data []byte) (*keymem.Key, error)

// Serve is the child's side of one call: it reads a request, has wrap or unwrap
// done, and answers. It returns an error if it could do neither.
func Serve(r io.Reader, w io.Writer, wrap, unwrap Operation) error {
	frame, fields, err := readFrame(r, requestFields)
	if err != nil {
		return err
	}
	defer frame.Close()
	do := unwrap
	if string(fields[fieldOperation]) == operationWrap {
		do = wrap
	}
	k := Key{Module: string(fields[fieldModule]), Token: string(fields[fieldToken]), Label: string(fields[fieldKey])}
	answer, err := do(k, fields[fieldPIN], fields[fieldData])
	if err != nil {
		kind := errs.KindOf(err)
		if kind == errs.Other {
			kind = errs.Unavailable
		}
		return writeFrame(w, []byte(kind.String()), []byte(err.Error()), nil)
	}
	defer answer.Close()
	return writeFrame(w, nil, nil, answer.Bytes())
}
