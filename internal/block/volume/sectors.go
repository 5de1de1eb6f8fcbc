package volume

import "encoding/binary"

// read fills p with the plaintext at off. The range is inside the volume and
// held.
func (v *Volume) read(p []byte, off int64) error {
	sector := int64(v.segment.SectorSize)
	for len(p) > 0 {
		into := off % sector
		if n := int64(len(p)) &^ (sector - 1); into == 0 && n > 0 {
			n = min(n, bufferSize) // decrypt while it is in the processor's cache
			if err := v.readSectors(p[:n], off); err != nil {
				return err
			}
			p, off = p[n:], off+n
			continue
		}
		n := min(int64(len(p)), sector-into)
		if err := v.readPart(p[:n], off-into, into); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// readPart fills p from the sector at off, starting at the byte into.
func (v *Volume) readPart(p []byte, off, into int64) error {
	buf := v.buffers.get(int64(v.segment.SectorSize))
	defer v.buffers.put(buf)
	whole := buf[:v.segment.SectorSize]
	if err := v.readSectors(whole, off); err != nil {
		return err
	}
	copy(p, whole[into:])
	return nil
}

// readSectors fills p, which is a whole number of sectors, with the plaintext
// at off, a multiple of the sector size.
func (v *Volume) readSectors(p []byte, off int64) error {
	if _, err := v.dev.ReadAt(p, v.segment.Offset+off); err != nil {
		return err
	}
	sector := v.segment.SectorSize
	for start := 0; start < len(p); {
		end := start
		for end < len(p) && !isZero(p[end:end+sector]) {
			end += sector
		}
		v.decrypt(p[start:end], off+int64(start))
		start = end + sector // what ended the run, if anything did, is zeros already
	}
	return nil
}

// write writes n bytes of p, or zeros if p is nil, at off. The range is inside
// the volume and held.
func (v *Volume) write(p []byte, off, n int64) error {
	buf := v.buffers.get(n)
	defer v.buffers.put(buf)
	for n > 0 {
		start := off &^ int64(v.segment.SectorSize-1)
		k := min(n, start+int64(len(buf))-off)
		var part []byte
		if p != nil {
			part, p = p[:k], p[k:]
		}
		if err := v.writePart(buf, part, off, k); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// writePart writes n bytes of p, or zeros if p is nil, at off, by one write of
// the sectors that hold them. These fit into buf.
func (v *Volume) writePart(buf, p []byte, off, n int64) error {
	sector := int64(v.segment.SectorSize)
	start, end := off&^(sector-1), (off+n+sector-1)&^(sector-1)
	out := buf[:end-start]
	for at := start; at < end; {
		from, to := max(at, off)-at, min(at+sector, off+n)-at // what changes in the sector at at
		if from == 0 && to == sector {
			// It is the first of a run that changes wholly.
			run := (off+n)&^(sector-1) - at
			v.encrypt(out[at-start:at-start+run], p, at-off, at)
			at += run
			continue
		}
		whole := out[at-start : at-start+sector]
		if err := v.readSectors(whole, at); err != nil {
			return err
		}
		if p == nil {
			clear(whole[from:to])
		} else {
			copy(whole[from:to], p[at+from-off:])
		}
		v.encryptSectors(whole, whole, at)
		at += sector
	}
	_, err := v.dev.WriteAt(out, v.segment.Offset+start)
	return err
}

// encrypt fills out, whole sectors at off of the data, with the ciphertext of
// p[from:], or of zeros if p is nil.
func (v *Volume) encrypt(out, p []byte, from, off int64) {
	src := out
	if p == nil {
		clear(out)
	} else {
		src = p[from : from+int64(len(out))]
	}
	v.encryptSectors(out, src, off)
}

// encryptSectors fills out with the ciphertext of src, sectors at off of the
// data, each under its key.
func (v *Volume) encryptSectors(out, src []byte, off int64) {
	if n := v.belowBoundary(off, len(out)); n > 0 {
		v.next.Encrypt(out[:n], src[:n], tweak(off), v.segment.SectorSize)
		out, src, off = out[n:], src[n:], off+int64(n)
	}
	if len(out) > 0 {
		v.cipher.Encrypt(out, src, tweak(off), v.segment.SectorSize)
	}
}

// decrypt decrypts p in place, sectors at off of the data, each under its key.
func (v *Volume) decrypt(p []byte, off int64) {
	if n := v.belowBoundary(off, len(p)); n > 0 {
		v.next.Decrypt(p[:n], p[:n], tweak(off), v.segment.SectorSize)
		p, off = p[n:], off+int64(n)
	}
	if len(p) > 0 {
		v.cipher.Decrypt(p, p, tweak(off), v.segment.SectorSize)
	}
}

// belowBoundary returns how many of the n bytes at off a deep rekey has already
// brought under the next key. The caller holds them, so that stays so.
func (v *Volume) belowBoundary(off int64, n int) int {
	return int(min(max(v.boundary.Load()-off, 0), int64(n)))
}

// tweak returns the XTS tweak of the sector at byte off of the data: dm-crypt's
// plain64 counts in 512 bytes whatever the sector size.
func tweak(off int64) uint64 { return uint64(off) / 512 }

// isZero reports whether a sector is all zeros. Ciphertext nearly always
// differs in its first eight bytes.
func isZero(sector []byte) bool {
	for ; len(sector) >= 8; sector = sector[8:] {
		if binary.NativeEndian.Uint64(sector) != 0 {
			return false
		}
	}
	return true
}
