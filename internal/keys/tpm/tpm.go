// Package tpm seals small secrets to a TPM 2.0: only this TPM opens them again,
// and only while the chosen PCRs, which record how the machine was started, have
// the values that they had. Commands are those of the TCG's TPM 2.0 library,
// spoken with go-tpm.
//
// Invariants: a secret crosses the bus encrypted, under a salt for the storage
// root key that was recorded when it was sealed; a TPM that answers with another
// one is refused. go-tpm has secrets in ordinary memory for the length of a
// call. All functions are safe for concurrent use: the resource manager of the
// kernel (/dev/tpmrm0) gives each its own session.
package tpm

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
)

const (
	// SecretMax bounds a sealed secret, in bytes.
	SecretMax = 128
	// PCRMax is the highest number of a PCR that can be chosen.
	PCRMax = 23
	// answerMax bounds an answer of a TPM, in bytes, and answerTimeout the wait
	// for it: making a key takes a discrete TPM seconds.
	answerMax     = 4096
	answerTimeout = 60 * time.Second
	headerSize    = 10
	blobMax       = 1024 // bytes of each part of a sealed secret
)

// Sealed is a secret that only its TPM opens. It is no secret itself.
type Sealed struct {
	PCRs    []int  `json:"pcrs"`    // in ascending order, at least one
	Parent  []byte `json:"parent"`  // the name of the storage root key
	Public  []byte `json:"public"`  // TPM2B_PUBLIC's content
	Private []byte `json:"private"` // TPM2B_PRIVATE's content
}

// Check refuses what [Seal] cannot have made.
func (s *Sealed) Check() error {
	if err := checkPCRs(s.PCRs); err != nil {
		return err
	}
	for _, b := range [][]byte{s.Parent, s.Public, s.Private} {
		if len(b) == 0 || len(b) > blobMax {
			return fmt.Errorf("a part of %d bytes in what a TPM sealed", len(b))
		}
	}
	return nil
}

func checkPCRs(pcrs []int) error {
	if len(pcrs) == 0 {
		return errs.New(errs.Invalid, "no PCR is chosen")
	}
	for i, n := range pcrs {
		if n < 0 || n > PCRMax || i > 0 && n <= pcrs[i-1] {
			return errs.New(errs.Invalid, "PCRs %v are not ascending numbers from 0 to %d", pcrs, PCRMax)
		}
	}
	return nil
}

// Seal seals secret, which stays the caller's, to the TPM at device under the
// present values of the PCRs. A device is the path of a kernel's ("/dev/tpmrm0")
// or "unix:/PATH" of an emulator's socket.
func Seal(ctx context.Context, device string, pcrs []int, secret *keymem.Key) (_ *Sealed, err error) {
	pcrs = slices.Sorted(slices.Values(pcrs))
	if err := checkPCRs(pcrs); err != nil {
		return nil, err
	}
	if secret.Len() > SecretMax {
		return nil, errs.New(errs.Invalid, "a secret of %d bytes is larger than %d", secret.Len(), SecretMax)
	}
	defer func() { err = errs.Wrap(err, "cannot seal to the TPM %s", device) }()
	t, root, err := openRoot(ctx, device)
	if err != nil {
		return nil, err
	}
	defer root.close(t)
	digest, err := readPCRs(t, pcrs)
	if err != nil {
		return nil, err
	}
	policy, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	if err := (tpm2.PolicyPCR{PcrDigest: tpm2.TPM2BDigest{Buffer: digest}, Pcrs: selection(pcrs...)}).Update(policy); err != nil {
		return nil, err
	}
	res, err := tpm2.Create{
		ParentHandle: tpm2.AuthHandle{
			Handle: root.handle, Name: root.name,
			Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.AESEncryption(128, tpm2.EncryptIn), tpm2.Salted(root.handle, root.public)),
		},
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: secret.Bytes()})}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
			// Without UserWithAuth the policy is the only way.
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, AdminWithPolicy: true, NoDA: true},
			AuthPolicy:       tpm2.TPM2BDigest{Buffer: policy.Hash().Digest},
		}),
	}.Execute(t)
	if err != nil {
		return nil, err
	}
	return &Sealed{PCRs: pcrs, Parent: root.name.Buffer, Public: res.OutPublic.Bytes(), Private: res.OutPrivate.Buffer}, nil
}

// Unseal returns the secret, which the caller closes. It returns an error of kind
// [errs.Locked] if the PCRs have other values, [errs.Denied] if it was sealed by
// another TPM or before that was cleared, and [errs.Unavailable] if there is none.
func Unseal(ctx context.Context, device string, s *Sealed) (_ *keymem.Key, err error) {
	defer func() { err = errs.Wrap(err, "cannot unseal by the TPM %s", device) }()
	if err := s.Check(); err != nil {
		return nil, errs.New(errs.Corrupt, "%w", err)
	}
	t, root, err := openRoot(ctx, device)
	if err != nil {
		return nil, err
	}
	defer root.close(t)
	if !slices.Equal(root.name.Buffer, s.Parent) {
		return nil, errs.New(errs.Denied, "it is another TPM, or was cleared since")
	}
	loaded, err := tpm2.Load{
		ParentHandle: tpm2.NamedHandle{Handle: root.handle, Name: root.name},
		InPrivate:    tpm2.TPM2BPrivate{Buffer: s.Private},
		InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](s.Public),
	}.Execute(t)
	if err != nil {
		return nil, errs.New(errs.Corrupt, "what it sealed was altered: %w", err)
	}
	defer flush(t, loaded.ObjectHandle)
	res, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{
		Handle: loaded.ObjectHandle, Name: loaded.Name,
		Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(t transport.TPM, session tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
			_, err := tpm2.PolicyPCR{PolicySession: session, Pcrs: selection(s.PCRs...)}.Execute(t)
			return err
		}, tpm2.AESEncryption(128, tpm2.EncryptOut), tpm2.Salted(root.handle, root.public)),
	}}.Execute(t)
	if errors.Is(err, tpm2.TPMRCPolicyFail) {
		return nil, errs.New(errs.Locked, "the machine was started in another way: PCRs %v have other values", s.PCRs)
	}
	if err != nil {
		return nil, err
	}
	return keymem.Take(res.OutData.Buffer)
}

// storageRoot is the TPM's storage root key, the same each time it is made until
// the TPM is cleared.
type storageRoot struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	public tpm2.TPMTPublic
}

// openRoot opens a TPM and makes its storage root key there. The caller closes
// both by close.
func openRoot(ctx context.Context, device string) (transport.TPMCloser, *storageRoot, error) {
	t, err := open(ctx, device)
	if err != nil {
		return nil, nil, err
	}
	r, err := makeRoot(t)
	if err != nil {
		t.Close()
		return nil, nil, err
	}
	return t, r, nil
}

func (r *storageRoot) close(t transport.TPMCloser) {
	flush(t, r.handle)
	t.Close()
}

func makeRoot(t transport.TPM) (*storageRoot, error) {
	res, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(t)
	if err != nil {
		return nil, errs.New(errs.Unavailable, "it makes no storage root key: %w", err)
	}
	r := &storageRoot{handle: res.ObjectHandle, name: res.Name}
	public, err := res.OutPublic.Contents()
	if err != nil {
		flush(t, r.handle)
		return nil, err
	}
	// The name binds the key that the salt is for; it is not taken on trust.
	name, err := tpm2.ObjectName(public)
	if err != nil || !slices.Equal(name.Buffer, res.Name.Buffer) {
		flush(t, r.handle)
		return nil, errs.New(errs.Denied, "its storage root key has not the name that it says")
	}
	r.public = *public
	return r, nil
}

// flush frees a handle. The kernel's resource manager would when the device is
// closed; an emulator does not.
func flush(t transport.TPM, handle tpm2.TPMHandle) {
	_, _ = tpm2.FlushContext{FlushHandle: handle}.Execute(t)
}

func selection(pcrs ...int) tpm2.TPMLPCRSelection {
	numbers := make([]uint, len(pcrs))
	for i, n := range pcrs {
		numbers[i] = uint(n)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(numbers...)}}}
}

// readPCRs returns the digest over the values of PCRs that a policy has.
func readPCRs(t transport.TPM, pcrs []int) ([]byte, error) {
	h := sha256.New()
	for _, n := range pcrs { // one at a time: a TPM returns at most 8
		res, err := tpm2.PCRRead{PCRSelectionIn: selection(n)}.Execute(t)
		if err != nil {
			return nil, err
		}
		if len(res.PCRValues.Digests) != 1 || len(res.PCRValues.Digests[0].Buffer) != sha256.Size {
			return nil, errs.New(errs.Unavailable, "it has no PCR %d for SHA-256", n)
		}
		h.Write(res.PCRValues.Digests[0].Buffer)
	}
	return h.Sum(nil), nil
}

// CheckDevice refuses what is no device's name.
func CheckDevice(device string) error {
	if path, _ := strings.CutPrefix(device, "unix:"); !strings.HasPrefix(path, "/") || len(device) > 256 {
		return errs.New(errs.Invalid, "TPM %.256q is no absolute path of a device and no unix:/PATH", device)
	}
	return nil
}

func open(ctx context.Context, device string) (transport.TPMCloser, error) {
	if err := CheckDevice(device); err != nil {
		return nil, err
	}
	path, isSocket := strings.CutPrefix(device, "unix:")
	if isSocket {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", path)
		if err != nil {
			return nil, errs.New(errs.Unavailable, "it does not answer: %w", err)
		}
		return &socket{conn}, nil
	}
	t, err := linuxtpm.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errs.New(errs.Unavailable, "there is no TPM: %w", err)
	}
	if err != nil {
		return nil, errs.New(errs.Unavailable, "it does not open: %w", err)
	}
	return t, nil
}

// socket speaks to an emulator: a command, then its answer.
type socket struct{ net.Conn }

func (s *socket) Send(command []byte) ([]byte, error) {
	if err := s.SetDeadline(time.Now().Add(answerTimeout)); err != nil {
		return nil, err
	}
	if _, err := s.Write(command); err != nil {
		return nil, err
	}
	answer := make([]byte, headerSize)
	if _, err := io.ReadFull(s, answer); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(answer[2:])
	if size < headerSize || size > answerMax {
		return nil, fmt.Errorf("an answer of %d bytes", size)
	}
	answer = append(answer, make([]byte, size-headerSize)...)
	_, err := io.ReadFull(s, answer[headerSize:])
	return answer, err
}
