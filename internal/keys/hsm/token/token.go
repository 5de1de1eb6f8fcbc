//go:build cgo

// Package token speaks PKCS #11 to a module: it wraps and unwraps under an
// AES-256 key in a token, with AES-GCM. It runs in a process of its own, for the
// module's library is loaded into it (package hsm).
//
// The library and the binding (miekg/pkcs11) have the PIN in ordinary memory; the
// process lives for one call.
package token

import (
	"crypto/rand"
	"errors"
	"runtime"

	"github.com/miekg/pkcs11"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/internal/keys/hsm"
)

const (
	keySize   = 32
	nonceSize = 12
	tagBits   = 128
	slotsMax  = 256
)

// session is one with a module, logged in.
type session struct {
	ctx *pkcs11.Ctx
	h   pkcs11.SessionHandle
}

func open(k hsm.Key, pin []byte) (*session, error) {
	runtime.LockOSThread() // some libraries keep state per thread
	ctx := pkcs11.New(k.Module)
	if ctx == nil {
		return nil, errs.New(errs.NotFound, "%s is no PKCS #11 library, or does not load", k.Module)
	}
	if err := ctx.Initialize(); err != nil {
		return nil, errs.New(errs.Unavailable, "the library does not initialise: %w", err)
	}
	slots, err := ctx.GetSlotList(true)
	if err != nil {
		return nil, errs.New(errs.Unavailable, "the library lists no slots: %w", err)
	}
	var found []uint
	for _, slot := range slots[:min(len(slots), slotsMax)] {
		if info, err := ctx.GetTokenInfo(slot); err == nil && info.Label == k.Token {
			found = append(found, slot)
		}
	}
	if len(found) != 1 {
		return nil, errs.New(errs.NotFound, "there are %d tokens of that label, not one", len(found))
	}
	h, err := ctx.OpenSession(found[0], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return nil, errs.New(errs.Unavailable, "no session: %w", err)
	}
	err = ctx.Login(h, pkcs11.CKU_USER, string(pin)) // the binding takes no other type
	switch {
	case errors.Is(err, pkcs11.Error(pkcs11.CKR_PIN_INCORRECT)), errors.Is(err, pkcs11.Error(pkcs11.CKR_PIN_LEN_RANGE)):
		return nil, errs.New(errs.Denied, "the PIN is wrong")
	case errors.Is(err, pkcs11.Error(pkcs11.CKR_PIN_LOCKED)):
		return nil, errs.New(errs.Denied, "the PIN is locked after wrong ones")
	case err != nil && !errors.Is(err, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)):
		return nil, errs.New(errs.Unavailable, "no login: %w", err)
	}
	return &session{ctx, h}, nil
}

// close ends the session. What fails then ends with the process.
func (s *session) close() {
	_ = s.ctx.Logout(s.h)
	_ = s.ctx.CloseSession(s.h)
	_ = s.ctx.Finalize()
	s.ctx.Destroy()
}

// find returns the AES key of that label; ok is false if there is none.
func (s *session) find(label string) (key pkcs11.ObjectHandle, ok bool, err error) {
	err = s.ctx.FindObjectsInit(s.h, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
	})
	if err != nil {
		return 0, false, err
	}
	found, _, err := s.ctx.FindObjects(s.h, 2)
	if err := errors.Join(err, s.ctx.FindObjectsFinal(s.h)); err != nil {
		return 0, false, err
	}
	if len(found) > 1 {
		return 0, false, errs.New(errs.InvalidState, "there is more than one AES key of that label")
	}
	if len(found) == 0 {
		return 0, false, nil
	}
	return found[0], true, nil
}

// make makes a key that never leaves the module.
func (s *session) make(label string) (pkcs11.ObjectHandle, error) {
	return s.ctx.GenerateKey(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, keySize), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true), pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
	})
}

// Wrap implements [hsm.Operation]: nonce, then ciphertext and tag.
func Wrap(k hsm.Key, pin, data []byte) (*keymem.Key, error) {
	s, err := open(k, pin)
	if err != nil {
		return nil, err
	}
	defer s.close()
	key, ok, err := s.find(k.Label)
	if err == nil && !ok {
		key, err = s.make(k.Label)
	}
	if err != nil {
		return nil, errs.Wrap(err, "no key")
	}
	nonce := make([]byte, nonceSize)
	rand.Read(nonce) // never fails: it ends the process instead
	params := pkcs11.NewGCMParams(nonce, nil, tagBits)
	defer params.Free()
	if err := s.ctx.EncryptInit(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, key); err != nil {
		return nil, errs.Wrap(err, "the key does not encrypt with AES-GCM")
	}
	text, err := s.ctx.Encrypt(s.h, data)
	if err != nil {
		return nil, err
	}
	// Some modules put a nonce of their own in its place.
	return keymem.Take(append(append([]byte(nil), params.IV()...), text...))
}

// Unwrap implements [hsm.Operation].
func Unwrap(k hsm.Key, pin, data []byte) (*keymem.Key, error) {
	if len(data) < nonceSize+tagBits/8 {
		return nil, errs.New(errs.Corrupt, "what was wrapped has %d bytes", len(data))
	}
	s, err := open(k, pin)
	if err != nil {
		return nil, err
	}
	defer s.close()
	key, ok, err := s.find(k.Label)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, errs.New(errs.NotFound, "the token has no AES key of that label")
	}
	params := pkcs11.NewGCMParams(data[:nonceSize], nil, tagBits)
	defer params.Free()
	if err := s.ctx.DecryptInit(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, key); err != nil {
		return nil, errs.Wrap(err, "the key does not decrypt with AES-GCM")
	}
	clear, err := s.ctx.Decrypt(s.h, data[nonceSize:])
	if err != nil {
		return nil, errs.New(errs.Denied, "the key is another one, or what was wrapped was altered: %w", err)
	}
	return keymem.Take(clear)
}
