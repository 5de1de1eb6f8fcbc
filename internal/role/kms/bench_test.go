package kms

import (
	"crypto/tls"
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

// benchmark runs work b.N times on so many connections at once.
func benchmark(b *testing.B, connections int, work func(conn *tls.Conn)) {
	dir := filepath.Join(b.TempDir(), "kms")
	k := start(b, dir)
	cfg := tlsOf(b, dir, first(b, dir))
	cfg.ClientSessionCache = tls.NewLRUClientSessionCache(16)
	todo := make(chan struct{}, 128)
	var group sync.WaitGroup
	for range connections {
		conn := dial(b, k.addr, cfg)
		group.Go(func() {
			for range todo {
				work(conn)
			}
		})
	}
	b.ResetTimer()
	for range b.N {
		todo <- struct{}{}
	}
	close(todo)
	group.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "op/s")
}

// must does one operation, which must succeed.
func must(b *testing.B, conn *tls.Conn, items ...kmip.OperationPayload) []kmip.ResponseBatchItem {
	m := kmip.NewRequestMessage(kmip.V1_4, items...)
	r, err := exchange(conn, &m)
	if err != nil {
		b.Error(err)
		return nil
	}
	for _, item := range r.BatchItem {
		if err := item.Err(); err != nil {
			b.Error(err)
		}
	}
	return r.BatchItem
}

// BenchmarkCreateActivate makes keys durably, on 1, 8 and 32 connections.
func BenchmarkCreateActivate(b *testing.B) {
	for _, n := range []int{1, 8, 32} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			benchmark(b, n, func(conn *tls.Conn) { must(b, conn, newAES(""), &payloads.ActivateRequestPayload{}) })
		})
	}
}

// BenchmarkGet gets one of 1000 keys.
func BenchmarkGet(b *testing.B) {
	for _, n := range []int{1, 8} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var once sync.Once
			ids := make(chan string, 1000)
			benchmark(b, n, func(conn *tls.Conn) {
				once.Do(func() {
					for range cap(ids) {
						ids <- must(b, conn, newAES(""))[0].ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
					}
					b.ResetTimer()
				})
				id := <-ids
				must(b, conn, &payloads.GetRequestPayload{UniqueIdentifier: id})
				ids <- id
			})
		})
	}
}
