//go:build !(amd64 || arm64) || purego

package xts

import "unsafe"

func implementations() []implementation { return []implementation{portable} }

func (implementation) scheduleSize() int { return int(unsafe.Sizeof(bitsliced{})) }

func (c *Cipher) expand(key []byte) { c.bitsliced().expand(key) }

func (c *Cipher) encrypt(dst, src []byte, iv uint64, sectorSize int) {
	c.bitsliced().portableEncrypt(dst, src, iv, sectorSize)
}

func (c *Cipher) decrypt(dst, src []byte, iv uint64, sectorSize int) {
	c.bitsliced().portableDecrypt(dst, src, iv, sectorSize)
}
