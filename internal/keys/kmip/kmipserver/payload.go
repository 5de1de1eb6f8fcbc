package kmipserver

import (
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

// The payloads below are those that the library lacks (KMIP 1.4, the section
// named at each).

// checkPayload is request and response of Check (section 4.10).
type checkPayload struct {
	UniqueIdentifier       string `ttlv:",omitempty"`
	UsageLimitsCount       *int64
	CryptographicUsageMask kmip.CryptographicUsageMask `ttlv:",omitempty"`
	LeaseTime              *time.Duration
}

func (*checkPayload) Operation() kmip.Operation { return kmip.OperationCheck }

// MACRequest is the request of MAC (section 4.33).
type MACRequest struct {
	UniqueIdentifier        string `ttlv:",omitempty"`
	CryptographicParameters *kmip.CryptographicParameters
	Data                    []byte `ttlv:",omitempty"`
	CorrelationValue        []byte `ttlv:",omitempty,version=v1.3.."`
	InitIndicator           *bool  `ttlv:",version=v1.3.."`
	FinalIndicator          *bool  `ttlv:",version=v1.3.."`
}

// Operation implements [kmip.OperationPayload].
func (*MACRequest) Operation() kmip.Operation { return kmip.OperationMAC }

// MACResponse is the response of MAC (section 4.33).
type MACResponse struct {
	UniqueIdentifier string
	MACData          []byte `ttlv:",omitempty"`
}

// Operation implements [kmip.OperationPayload].
func (*MACResponse) Operation() kmip.Operation { return kmip.OperationMAC }

// MACVerifyRequest is the request of MAC Verify (section 4.34).
type MACVerifyRequest struct {
	UniqueIdentifier        string `ttlv:",omitempty"`
	CryptographicParameters *kmip.CryptographicParameters
	Data                    []byte `ttlv:",omitempty"`
	MACData                 []byte `ttlv:",omitempty"`
	CorrelationValue        []byte `ttlv:",omitempty,version=v1.3.."`
	InitIndicator           *bool  `ttlv:",version=v1.3.."`
	FinalIndicator          *bool  `ttlv:",version=v1.3.."`
}

// Operation implements [kmip.OperationPayload].
func (*MACVerifyRequest) Operation() kmip.Operation { return kmip.OperationMACVerify }

// MACVerifyResponse is the response of MAC Verify (section 4.34).
type MACVerifyResponse struct {
	UniqueIdentifier  string
	ValidityIndicator kmip.ValidityIndicator
}

// Operation implements [kmip.OperationPayload].
func (*MACVerifyResponse) Operation() kmip.Operation { return kmip.OperationMACVerify }

// rngRetrieveRequest is the request of RNG Retrieve (section 4.35).
type rngRetrieveRequest struct{ DataLength int32 }

func (*rngRetrieveRequest) Operation() kmip.Operation { return kmip.OperationRNGRetrieve }

type rngRetrieveResponse struct{ Data []byte }

func (*rngRetrieveResponse) Operation() kmip.Operation { return kmip.OperationRNGRetrieve }

// rngSeedRequest is the request of RNG Seed (section 4.36).
type rngSeedRequest struct{ Data []byte }

func (*rngSeedRequest) Operation() kmip.Operation { return kmip.OperationRNGSeed }

type rngSeedResponse struct{ DataLength int32 }

func (*rngSeedResponse) Operation() kmip.Operation { return kmip.OperationRNGSeed }

// concealPayload has what a client sent as secret wiped after the answer.
func (r *request) concealPayload(p kmip.OperationPayload) {
	switch p := p.(type) {
	case *payloads.RegisterRequestPayload:
		if bytes, err := material(p.Object); err == nil {
			r.conceal(bytes)
		}
	case *payloads.EncryptRequestPayload:
		r.conceal(p.Data)
	case *MACRequest:
		r.conceal(p.Data)
	case *deriveRequest:
		r.conceal(p.DerivationParameters.DerivationData)
	case *rngSeedRequest:
		r.conceal(p.Data)
	}
}
