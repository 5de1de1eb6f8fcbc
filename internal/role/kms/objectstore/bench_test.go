package objectstore

import (
	"fmt"
	"testing"

	"strongroom/internal/keys/kmip/kmipserver"
)

// BenchmarkFind looks at every one of 20,000 objects.
func BenchmarkFind(b *testing.B) {
	const objects = 20000
	n := newNode(b)
	for i := 0; i < objects; i += 500 {
		err := n.Update(b.Context(), account, func(tx kmipserver.Tx) error {
			for j := range 500 {
				if err := tx.Put(newKey(b, fmt.Sprint("key-", i+j))); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	for _, newest := range []bool{false, true} {
		b.Run(fmt.Sprintf("newest=%v", newest), func(b *testing.B) {
			for b.Loop() {
				seen := 0
				err := n.View(b.Context(), account, func(r kmipserver.Reader) error {
					for _, err := range r.Find(kmipserver.Query{Newest: newest}) {
						if err != nil {
							return err
						}
						seen++
					}
					return nil
				})
				if err != nil || seen != objects {
					b.Fatal(seen, err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*objects), "ns/object")
		})
	}
}
