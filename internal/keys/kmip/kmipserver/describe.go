package kmipserver

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/ovh/kmip-go"

	"strongroom/internal/crypto/keymem"
)

// Operations returns all operations that servers of this package can do.
func Operations() []kmip.Operation { return slices.Sorted(maps.Keys(operations())) }

// Since returns the version from which on clients have an operation of
// [Operations].
func Since(op kmip.Operation) kmip.ProtocolVersion { return operations()[op].since }

// AttributeInfo is an attribute that objects can have, and what a client may do
// with it.
type AttributeInfo struct {
	Name    kmip.AttributeName
	Since   kmip.ProtocolVersion // clients of older versions do not see it
	Multi   bool                 // it can have several values
	Initial bool                 // given when the object is made
	Add     bool
	Modify  bool
	Delete  bool
}

// Attributes lists the attributes that are not custom ones, by name.
func Attributes() []AttributeInfo {
	var list []AttributeInfo
	for _, name := range slices.Sorted(maps.Keys(attributeRules)) {
		r := attributeRules[name]
		if r.since == (kmip.ProtocolVersion{}) {
			r.since = kmip.V1_0
		}
		list = append(list, AttributeInfo{name, r.since, r.multi, r.initial, r.add, r.modify, r.delete})
	}
	return list
}

// Bound is a limit of what clients can have a server do.
type Bound struct{ Of, Value string }

// Bounds lists the limits of servers with the default [Limits].
func Bounds() []Bound {
	l := Limits{}.withDefaults()
	return []Bound{
		{"Connections at once", fmt.Sprint(l.Connections)},
		{"Connections at once from one address", fmt.Sprint(l.PerAddress)},
		{"Time for the TLS handshake", wait(l.Handshake)},
		{"Time between two requests of a connection", wait(l.Idle)},
		{"Time for a request to come, for its answer to be taken, and for a client to show who it is", wait(l.Request)},
		{"Length of a request", size(l.Message)},
		{"Length of an answer", size(l.Answer)},
		{"Structures within structures", fmt.Sprint(l.Depth)},
		{"Values in a request", fmt.Sprint(l.Values)},
		{"Items of a batch", fmt.Sprint(l.Batch)},
		{"Key material of an object", size(keymem.SizeMax)},
		{"Attributes of an object, each value counted", fmt.Sprint(attributesMax)},
		{"Length of a derived key", size(derivedMax)},
		{"Iterations of PBKDF2", fmt.Sprint(iterationsMax)},
		{"Parts of a split key", fmt.Sprint(partsMax)},
		{"Random bytes of an RNG Retrieve", size(randomMax)},
		{"Objects that Locate gives at once", fmt.Sprint(locateMax)},
	}
}

func size(bytes int) string {
	switch {
	case bytes%(1<<20) == 0:
		return fmt.Sprintf("%d MiB", bytes>>20)
	case bytes%(1<<10) == 0:
		return fmt.Sprintf("%d KiB", bytes>>10)
	}
	return fmt.Sprintf("%d bytes", bytes)
}

func wait(d time.Duration) string {
	if d%time.Minute == 0 {
		return fmt.Sprintf("%d min", d/time.Minute)
	}
	return fmt.Sprintf("%d s", d/time.Second)
}
