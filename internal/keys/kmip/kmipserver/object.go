package kmipserver

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"context"
	"errors"
	"iter"
	"slices"
	"time"

	"github.com/ovh/kmip-go"

	"strongroom/internal/crypto/keymem"
)

// Object is a managed object (KMIP 1.4 section 2.2) of one account.
//
// An Object that was given to or got from a store shares Attributes' values
// and Material with it: attribute values are never changed, only replaced.
type Object struct {
	ID   string
	Type kmip.ObjectType
	// Attributes are what Get Attributes can return, State and dates included;
	// Unique Identifier and Object Type are not among them. AttributeIndex is
	// nil for index 0.
	Attributes []kmip.Attribute
	Layout     Layout
	// Template is what a template gives to objects made from it.
	Template []kmip.Attribute
	// Material is the key or data, in the clear or as it was wrapped by the
	// client; nil once destroyed, for a template, and for a key whose value is
	// elsewhere. The store owns it.
	Material *keymem.Key
	Archived bool
}

// Keeps reports whether servers of this package know objects of a type. What a store
// has of others is of a newer release.
func Keeps(t kmip.ObjectType) bool {
	return t >= kmip.ObjectTypeCertificate && t <= kmip.ObjectTypePGPKey
}

// Layout says what the bytes of an object's Material are.
type Layout struct {
	Format      kmip.KeyFormatType
	Compression kmip.KeyCompressionType
	Algorithm   kmip.CryptographicAlgorithm // 0 if not told
	Length      int32                       // bits; 0 if not told
	SecretType  kmip.SecretDataType         // of Secret Data
	OpaqueType  kmip.OpaqueDataType         // of Opaque Objects
	PGPVersion  int32                       // of PGP Keys
	Part        Part                        // of Split Keys
	Wrapping    *kmip.KeyWrappingData       // how a client wrapped it; nil in the clear
}

// ErrNoObject is reported by a [Tx] for an identifier that the account does
// not have.
var ErrNoObject = errors.New("no such object")

// Query narrows what a store looks through. An object is newer than another if
// its identifier is greater.
type Query struct {
	Name   string // objects with this Name attribute only; "" for all
	Newest bool   // newest first, not oldest
	After  string // only what comes, in this order, after the identifier; "" for all
	// Due leaves objects that [Query.IsDue] reports, in any order: with neither of
	// the others.
	Due time.Time
}

// IsDue reports whether q asks for o as far as its dates are concerned: with Due,
// for objects that a date has changed, by Due, which is not stored yet.
func (q Query) IsDue(o *Object) bool {
	at, ok := o.NextChange()
	return q.Due.IsZero() || ok && !at.After(q.Due)
}

// NextChange returns the date that changes the state of o next, as it is stored,
// and whether there is one.
func (o *Object) NextChange() (time.Time, bool) {
	if o.Archived || !hasState(o.Type) {
		return time.Time{}, false
	}
	switch o.state() {
	case kmip.StatePreActive:
		return o.date(kmip.AttributeNameActivationDate)
	case kmip.StateActive:
		return o.date(kmip.AttributeNameDeactivationDate)
	}
	return time.Time{}, false
}

// Passes reports whether what q asks for comes after an identifier.
func (q Query) Passes(id string) bool {
	switch {
	case q.After == "":
		return true
	case q.Newest:
		return id < q.After
	}
	return id > q.After
}

// Reader is a consistent view of one account's objects. Objects it returns are
// the caller's to change, but nothing of it reaches the store but by
// [Tx.Put]; their Material may be used until the view ends.
type Reader interface {
	// Get returns an object or ErrNoObject.
	Get(id string) (*Object, error)
	// Find returns the objects that match q, in the order that q asks for. They
	// come without their Material and are not for [Tx.Put].
	Find(q Query) iter.Seq2[*Object, error]
}

// Tx is a [Reader] whose changes take effect together when the transaction
// ends without an error, and not at all if it does not.
type Tx interface {
	Reader
	// Put inserts or replaces an object. The store owns o's Material from the
	// transaction's successful end on, and releases the one that o replaces if
	// that is another.
	Put(o *Object) error
}

// Store keeps managed objects by account. It must serialise transactions that
// touch the same object; f may run again if it met a conflict. It is safe for
// concurrent use.
type Store interface {
	View(ctx context.Context, account string, f func(Reader) error) error
	Update(ctx context.Context, account string, f func(Tx) error) error
}

// index returns the place of attribute name with index i, or -1.
func (o *Object) index(name kmip.AttributeName, i int32) int {
	return slices.IndexFunc(o.Attributes, func(a kmip.Attribute) bool {
		return a.AttributeName == name && indexOf(a) == i
	})
}

func indexOf(a kmip.Attribute) int32 {
	if a.AttributeIndex == nil {
		return 0
	}
	return *a.AttributeIndex
}

// set gives the single-valued attribute name a value.
func (o *Object) set(name kmip.AttributeName, value any) {
	o.unset(name)
	o.Attributes = append(o.Attributes, kmip.Attribute{AttributeName: name, AttributeValue: value})
}

// has reports whether o has any value of attribute name.
func (o *Object) has(name kmip.AttributeName) bool {
	return slices.ContainsFunc(o.Attributes, func(a kmip.Attribute) bool { return a.AttributeName == name })
}

func (o *Object) unset(name kmip.AttributeName) {
	o.Attributes = slices.DeleteFunc(o.Attributes, func(a kmip.Attribute) bool { return a.AttributeName == name })
}

// add appends a value of attribute name under the next free index and returns
// what was added.
func (o *Object) add(name kmip.AttributeName, value any) kmip.Attribute {
	next := int32(0)
	for _, a := range o.Attributes {
		if a.AttributeName == name {
			next = max(next, indexOf(a)+1)
		}
	}
	a := kmip.Attribute{AttributeName: name, AttributeValue: value}
	if next > 0 {
		a.AttributeIndex = &next
	}
	o.Attributes = append(o.Attributes, a)
	return a
}

// attribute returns the lowest-indexed value of name as a T.
func attribute[T any](o *Object, name kmip.AttributeName) (value T, ok bool) {
	for _, a := range o.Attributes {
		if a.AttributeName == name {
			value, ok = a.AttributeValue.(T)
			return value, ok
		}
	}
	return value, false
}

func (o *Object) state() kmip.State {
	state, _ := attribute[kmip.State](o, kmip.AttributeNameState)
	return state
}

func (o *Object) usage() kmip.CryptographicUsageMask {
	mask, _ := attribute[kmip.CryptographicUsageMask](o, kmip.AttributeNameCryptographicUsageMask)
	return mask
}

func (o *Object) date(name kmip.AttributeName) (time.Time, bool) {
	return attribute[time.Time](o, name)
}

// elsewhere reports whether the value of o, a key, was never here (KMIP 1.4 section
// 3.39).
func (o *Object) elsewhere() bool {
	present, ok := attribute[bool](o, kmip.AttributeNameKeyValuePresent)
	return ok && !present
}

// clone returns a copy whose attribute list may be changed.
func (o *Object) clone() *Object {
	c := *o
	c.Attributes = slices.Clone(o.Attributes)
	return &c
}

// hasState tells the objects with a life cycle (KMIP 1.4 section 3.22).
func hasState(t kmip.ObjectType) bool {
	return t != kmip.ObjectTypeOpaqueObject && t != kmip.ObjectTypeTemplate
}

// advance brings the state up to date with the dates that have come (KMIP 1.4
// section 3.22, transitions 4 and 6).
func (o *Object) advance(now time.Time) {
	if !hasState(o.Type) {
		return
	}
	if at, ok := o.date(kmip.AttributeNameActivationDate); ok && o.state() == kmip.StatePreActive && !at.After(now) {
		o.set(kmip.AttributeNameState, kmip.StateActive)
	}
	if at, ok := o.date(kmip.AttributeNameDeactivationDate); ok && o.state() == kmip.StateActive && !at.After(now) {
		o.set(kmip.AttributeNameState, kmip.StateDeactivated)
	}
}

// Destroyed reports whether the object was destroyed: its material is gone, and its
// attributes are what is left.
func (o *Object) Destroyed() bool { return destroyed(o) }
