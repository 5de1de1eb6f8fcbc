//go:build !(amd64 || arm64) || purego

package xts

func expectedImplementations([]string) []string { return []string{"portable"} }
