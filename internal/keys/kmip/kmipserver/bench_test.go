package kmipserver

import (
	"testing"

	"github.com/ovh/kmip-go/payloads"
)

// BenchmarkGet and the others measure this server on an in-memory store over
// mutual TLS, GOMAXPROCS times -cpu connections at once.
func BenchmarkGet(b *testing.B) {
	s := newBench(b, Limits{})
	id := do[payloads.CreateResponsePayload](s.dial(b, "one"), newKey()).UniqueIdentifier
	b.SetParallelism(4)
	b.RunParallel(func(pb *testing.PB) {
		conn := s.dial(b, "one")
		for pb.Next() {
			do[payloads.GetResponsePayload](conn, &payloads.GetRequestPayload{UniqueIdentifier: id})
		}
	})
}

func BenchmarkCreate(b *testing.B) {
	s := newBench(b, Limits{})
	b.SetParallelism(4)
	b.RunParallel(func(pb *testing.PB) {
		conn := s.dial(b, "one")
		for pb.Next() {
			do[payloads.CreateResponsePayload](conn, newKey())
		}
	})
}

func BenchmarkConnectGet(b *testing.B) {
	s := newBench(b, Limits{})
	id := do[payloads.CreateResponsePayload](s.dial(b, "one"), newKey()).UniqueIdentifier
	for b.Loop() {
		conn := s.dial(b, "one")
		do[payloads.GetResponsePayload](conn, &payloads.GetRequestPayload{UniqueIdentifier: id})
		conn.Close()
	}
}
