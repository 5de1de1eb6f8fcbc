package tpm

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/test/swtpm"
)

// emulator is a TPM of a test.
type emulator struct {
	*swtpm.TPM
	t testing.TB
}

func startEmulator(t testing.TB) *emulator {
	t.Helper()
	return &emulator{swtpm.Start(t), t}
}

func (e *emulator) device() string { return "unix:" + e.Socket() }

func (e *emulator) do(what func(transport.TPM) error) {
	e.t.Helper()
	t, err := open(context.Background(), e.device())
	if err != nil {
		e.t.Fatal(err)
	}
	defer t.Close()
	if err := what(t); err != nil {
		e.t.Fatal(err)
	}
}

// extend is what happens when something else is started than before.
func (e *emulator) extend(pcr int) {
	e.t.Helper()
	e.do(func(t transport.TPM) error {
		_, err := tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
			Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: bytes.Repeat([]byte{7}, 32)}}},
		}.Execute(t)
		return err
	})
}

func random(t testing.TB) *keymem.Key {
	t.Helper()
	k, err := keymem.Random(32)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

// check unseals and wants the secret, or an error of that kind.
func check(t *testing.T, what, device string, s *Sealed, want *keymem.Key, kind errs.Kind) {
	t.Helper()
	got, err := Unseal(t.Context(), device, s)
	if got != nil {
		defer got.Close()
	}
	if kind != errs.Other && (errs.KindOf(err) != kind || got != nil) {
		t.Errorf("%s: error %v, want kind %v", what, err, kind)
	}
	if kind == errs.Other && (err != nil || !got.Equal(want)) {
		t.Errorf("%s: %v", what, err)
	}
}

// TestSeal takes a secret through the life of a TPM.
func TestSeal(t *testing.T) {
	t.Parallel()
	e, secret := startEmulator(t), random(t)
	e.extend(7)
	s, err := Seal(t.Context(), e.device(), []int{11, 7}, secret)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(s.PCRs, []int{7, 11}) {
		t.Errorf("PCRs %v", s.PCRs)
	}
	for range 20 { // more than a TPM has handles: none is left behind
		check(t, "at once", e.device(), s, secret, errs.Other)
	}
	e.extend(12)
	check(t, "after another PCR has changed", e.device(), s, secret, errs.Other)
	e.extend(11)
	check(t, "after its PCR has changed", e.device(), s, nil, errs.Locked)
	e.Reboot()
	check(t, "before the machine was measured", e.device(), s, nil, errs.Locked)
	e.extend(7)
	check(t, "after it was started as before", e.device(), s, secret, errs.Other)

	for name, part := range map[string]func(*Sealed) *[]byte{
		"private": func(s *Sealed) *[]byte { return &s.Private }, "public": func(s *Sealed) *[]byte { return &s.Public },
	} {
		altered := *s
		*part(&altered) = slices.Clone(*part(&altered))
		(*part(&altered))[len(*part(&altered))-1] ^= 1
		check(t, "altered "+name, e.device(), &altered, nil, errs.Corrupt)
	}
	weaker := *s
	weaker.PCRs = []int{7}
	check(t, "with fewer PCRs", e.device(), &weaker, nil, errs.Locked)
	check(t, "by another TPM", startEmulator(t).device(), s, nil, errs.Denied)

	e.do(func(tpm transport.TPM) error {
		_, err := tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}.Execute(tpm)
		return err
	})
	check(t, "after it was cleared", e.device(), s, nil, errs.Denied)
	e.Stop()
	check(t, "without a TPM", e.device(), s, nil, errs.Unavailable)
}

// TestBus looks at all that goes over the bus: the secret does not.
func TestBus(t *testing.T) {
	t.Parallel()
	e, secret := startEmulator(t), random(t)
	path := e.Socket() + ".tap"
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var seen bytes.Buffer // of one connection after another
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			func() {
				defer conn.Close()
				tpm, err := net.Dial("unix", e.Socket())
				if err != nil {
					return
				}
				defer tpm.Close()
				for {
					for _, way := range [][2]net.Conn{{conn, tpm}, {tpm, conn}} { // a command, then its answer
						message := make([]byte, headerSize)
						if _, err := io.ReadFull(way[0], message); err != nil {
							return
						}
						message = append(message, make([]byte, binary.BigEndian.Uint32(message[2:])-headerSize)...)
						if _, err := io.ReadFull(way[0], message[headerSize:]); err != nil {
							return
						}
						seen.Write(message)
						if _, err := way[1].Write(message); err != nil {
							return
						}
					}
				}
			}()
		}
	}()
	s, err := Seal(t.Context(), "unix:"+path, []int{0}, secret)
	if err != nil {
		t.Fatal(err)
	}
	check(t, "through a tap", "unix:"+path, s, secret, errs.Other)
	l.Close()
	<-done
	if seen.Len() < 1000 {
		t.Fatalf("the tap saw %d bytes only", seen.Len())
	}
	if bytes.Contains(seen.Bytes(), secret.Bytes()) {
		t.Error("the secret went over the bus in plain")
	}
}

func TestRefuses(t *testing.T) {
	t.Parallel()
	for _, pcrs := range [][]int{nil, {-1}, {24}, {7, 7}} {
		if _, err := Seal(t.Context(), "/dev/none", pcrs, random(t)); errs.KindOf(err) != errs.Invalid {
			t.Errorf("PCRs %v: %v", pcrs, err)
		}
	}
	for _, device := range []string{"", "tpm0", "unix:", "unix:relative"} {
		if _, err := Seal(t.Context(), device, []int{7}, random(t)); errs.KindOf(err) != errs.Invalid {
			t.Errorf("device %q: %v", device, err)
		}
	}
	if _, err := Seal(t.Context(), filepath.Join("/dev", "there-is-no-tpm"), []int{7}, random(t)); errs.KindOf(err) != errs.Unavailable {
		t.Errorf("no device: %v", err)
	}
}
