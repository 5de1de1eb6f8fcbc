package kms

import (
	"bytes"
	"context"

	"connectrpc.com/connect"
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
)

// The sizes of AES-GCM as this API has it, in bytes.
const (
	gcmNonce = 12
	gcmTag   = 16
)

func gcmParameters() *kmip.CryptographicParameters {
	return &kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeGCM, CryptographicAlgorithm: kmip.CryptographicAlgorithmAES, TagLength: gcmTag}
}

func (a *keyAPI) Encrypt(ctx context.Context, req *connect.Request[strongroomv1.EncryptRequest]) (*connect.Response[strongroomv1.EncryptResponse], error) {
	m := req.Msg
	id, err := a.keyID(ctx, m)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.EncryptResponse{Id: id}
	err = call(ctx, a, &payloads.EncryptRequestPayload{
		UniqueIdentifier: id, CryptographicParameters: gcmParameters(), Data: m.GetPlaintext(), AuthenticatedEncryptionAdditionalData: m.GetAdditionalData(),
	}, func(p *payloads.EncryptResponsePayload) {
		res.Nonce, res.Ciphertext = p.IVCounterNonce, append(p.Data, p.AuthenticatedEncryptionTag...)
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

func (a *keyAPI) Decrypt(ctx context.Context, req *connect.Request[strongroomv1.DecryptRequest]) (*connect.Response[strongroomv1.DecryptResponse], error) {
	m := req.Msg
	switch {
	case m.GetId() == "" || len(m.GetId()) > textMax:
		return nil, errs.New(errs.Invalid, "an id of %d bytes: it is that in the answer to Encrypt", len(m.GetId()))
	case len(m.GetNonce()) != gcmNonce || len(m.GetCiphertext()) < gcmTag:
		return nil, errs.New(errs.Invalid, "the nonce has %d bytes and the ciphertext %d: it is %d, and at least %d", len(m.GetNonce()), len(m.GetCiphertext()), gcmNonce, gcmTag)
	}
	res := &strongroomv1.DecryptResponse{}
	end := len(m.GetCiphertext()) - gcmTag
	err := call(ctx, a, &payloads.DecryptRequestPayload{
		UniqueIdentifier: m.GetId(), CryptographicParameters: gcmParameters(), IVCounterNonce: m.GetNonce(),
		Data: m.GetCiphertext()[:end], AuthenticatedEncryptionTag: m.GetCiphertext()[end:], AuthenticatedEncryptionAdditionalData: m.GetAdditionalData(),
	}, func(p *payloads.DecryptResponsePayload) { res.Plaintext = bytes.Clone(p.Data) })
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

func (a *keyAPI) GenerateMAC(ctx context.Context, req *connect.Request[strongroomv1.GenerateMACRequest]) (*connect.Response[strongroomv1.GenerateMACResponse], error) {
	id, err := a.keyID(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	res := &strongroomv1.GenerateMACResponse{Id: id}
	err = call(ctx, a, &kmipserver.MACRequest{UniqueIdentifier: id, Data: req.Msg.GetData()}, func(p *kmipserver.MACResponse) { res.Mac = p.MACData })
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

func (a *keyAPI) VerifyMAC(ctx context.Context, req *connect.Request[strongroomv1.VerifyMACRequest]) (*connect.Response[strongroomv1.VerifyMACResponse], error) {
	m := req.Msg
	if m.GetId() == "" || len(m.GetId()) > textMax {
		return nil, errs.New(errs.Invalid, "an id of %d bytes: it is that in the answer to GenerateMAC", len(m.GetId()))
	}
	res := &strongroomv1.VerifyMACResponse{}
	err := call(ctx, a, &kmipserver.MACVerifyRequest{UniqueIdentifier: m.GetId(), Data: m.GetData(), MACData: m.GetMac()}, func(p *kmipserver.MACVerifyResponse) {
		res.Valid = p.ValidityIndicator == kmip.ValidityIndicatorValid
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}
