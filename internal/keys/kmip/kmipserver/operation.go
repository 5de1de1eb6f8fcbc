package kmipserver

//lint:file-ignore SA1019 clients of older versions use what KMIP 1.3 deprecates

import (
	"errors"

	"github.com/google/uuid"
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
)

// operation is how one operation is decoded and run.
type operation struct {
	since   kmip.ProtocolVersion
	payload func() kmip.OperationPayload // an empty request payload
	run     func(*request, kmip.OperationPayload) (kmip.OperationPayload, error)
}

// on makes an operation of a method of request.
func on[T any, P interface {
	*T
	kmip.OperationPayload
}](since kmip.ProtocolVersion, run func(*request, P) (kmip.OperationPayload, error)) operation {
	return operation{
		since:   since,
		payload: func() kmip.OperationPayload { return P(new(T)) },
		run: func(r *request, p kmip.OperationPayload) (kmip.OperationPayload, error) {
			out, err := run(r, p.(P))
			if err != nil {
				return nil, err // never a half-filled payload
			}
			return out, nil
		},
	}
}

// operations returns everything this server can do.
func operations() map[kmip.Operation]operation {
	return map[kmip.Operation]operation{
		kmip.OperationCreate:             on(kmip.V1_0, (*request).create),
		kmip.OperationCreateKeyPair:      on(kmip.V1_0, (*request).createKeyPair),
		kmip.OperationRegister:           on(kmip.V1_0, (*request).register),
		kmip.OperationReKey:              on(kmip.V1_0, (*request).rekey),
		kmip.OperationReKeyKeyPair:       on(kmip.V1_1, (*request).rekeyKeyPair),
		kmip.OperationDeriveKey:          on(kmip.V1_0, (*request).deriveKey),
		kmip.OperationLocate:             on(kmip.V1_0, (*request).locate),
		kmip.OperationCheck:              on(kmip.V1_0, (*request).check),
		kmip.OperationGet:                on(kmip.V1_0, (*request).get),
		kmip.OperationGetAttributes:      on(kmip.V1_0, (*request).getAttributes),
		kmip.OperationGetAttributeList:   on(kmip.V1_0, (*request).getAttributeList),
		kmip.OperationAddAttribute:       on(kmip.V1_0, (*request).addAttribute),
		kmip.OperationModifyAttribute:    on(kmip.V1_0, (*request).modifyAttribute),
		kmip.OperationDeleteAttribute:    on(kmip.V1_0, (*request).deleteAttribute),
		kmip.OperationObtainLease:        on(kmip.V1_0, (*request).obtainLease),
		kmip.OperationGetUsageAllocation: on(kmip.V1_0, (*request).getUsageAllocation),
		kmip.OperationActivate:           on(kmip.V1_0, (*request).activate),
		kmip.OperationRevoke:             on(kmip.V1_0, (*request).revoke),
		kmip.OperationDestroy:            on(kmip.V1_0, (*request).destroy),
		kmip.OperationArchive:            on(kmip.V1_0, (*request).archive),
		kmip.OperationRecover:            on(kmip.V1_0, (*request).recoverObject),
		kmip.OperationQuery:              on(kmip.V1_0, (*request).query),
		kmip.OperationDiscoverVersions:   on(kmip.V1_1, (*request).discoverVersions),
		kmip.OperationEncrypt:            on(kmip.V1_2, (*request).encrypt),
		kmip.OperationDecrypt:            on(kmip.V1_2, (*request).decrypt),
		kmip.OperationSign:               on(kmip.V1_2, (*request).sign),
		kmip.OperationSignatureVerify:    on(kmip.V1_2, (*request).signatureVerify),
		kmip.OperationMAC:                on(kmip.V1_2, (*request).mac),
		kmip.OperationMACVerify:          on(kmip.V1_2, (*request).macVerify),
		kmip.OperationHash:               on(kmip.V1_2, (*request).hash),
		kmip.OperationRNGRetrieve:        on(kmip.V1_2, (*request).rngRetrieve),
		kmip.OperationRNGSeed:            on(kmip.V1_2, (*request).rngSeed),
		kmip.OperationCreateSplitKey:     on(kmip.V1_2, (*request).createSplitKey),
		kmip.OperationJoinSplitKey:       on(kmip.V1_2, (*request).joinSplitKey),
	}
}

// makes returns how many objects an operation makes if it succeeds.
func makes(p kmip.OperationPayload) int {
	switch p := p.(type) {
	case *payloads.CreateRequestPayload, *payloads.RegisterRequestPayload, *payloads.RekeyRequestPayload, *deriveRequest, *joinSplitKeyRequest:
		return 1
	case *payloads.CreateKeyPairRequestPayload, *payloads.RekeyKeyPairRequestPayload:
		return 2
	case *createSplitKeyRequest:
		if p.SplitKeyParts < 0 || p.SplitKeyParts > partsMax {
			return 0 // it fails, and takes nothing of what others may make
		}
		return int(p.SplitKeyParts)
	}
	return 0
}

// view calls f with the object that an item is about, its state up to date.
func (r *request) view(given string, f func(Reader, *Object) error) error {
	id, err := r.id(given)
	if err != nil {
		return err
	}
	return r.server.store.View(r.ctx, r.client.Account, func(v Reader) error {
		o, err := r.load(v, id)
		if err != nil {
			return err
		}
		return f(v, o)
	})
}

// update is view with the changes that f makes to the object stored. Objects
// that are archived or destroyed cannot be changed.
func (r *request) update(given string, f func(Tx, *Object) error) error {
	return r.updateAny(given, func(tx Tx, o *Object) error {
		if err := usable(o); err != nil {
			return err
		}
		return f(tx, o)
	})
}

// updateAny is update for objects in any state.
func (r *request) updateAny(given string, f func(Tx, *Object) error) error {
	id, err := r.id(given)
	if err != nil {
		return err
	}
	return r.change(func(tx Tx) error {
		o, err := r.load(tx, id)
		if err != nil {
			return err
		}
		if err := f(tx, o); err != nil {
			return err
		}
		return r.put(tx, o)
	})
}

// put stores o as changed now.
func (r *request) put(tx Tx, o *Object) error {
	o.advance(r.now)
	o.set(kmip.AttributeNameLastChangeDate, r.now)
	return tx.Put(o)
}

func (r *request) load(v Reader, id string) (*Object, error) {
	o, err := v.Get(id)
	if errors.Is(err, ErrNoObject) {
		return nil, refuse(kmip.ResultReasonItemNotFound, "there is no object %.64q", id)
	}
	if err != nil {
		return nil, err
	}
	o.advance(r.now)
	return o, nil
}

// usable refuses an object that is archived or destroyed.
func usable(o *Object) error {
	switch s := o.state(); {
	case o.Archived:
		return refuse(kmip.ResultReasonObjectArchived, "the object is archived")
	case s == kmip.StateDestroyed, s == kmip.StateDestroyedCompromised:
		return refuse(kmip.ResultReasonPermissionDenied, "the object is destroyed")
	}
	return nil
}

// newID returns an identifier that no object has; later ones sort behind earlier
// ones (RFC 9562, UUID version 7).
func newID() string { return uuid.Must(uuid.NewV7()).String() }

func (r *request) discoverVersions(p *payloads.DiscoverVersionsRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.DiscoverVersionsResponsePayload{}
	if len(p.ProtocolVersion) == 0 {
		out.ProtocolVersion = supportedVersions
		return out, nil
	}
	for _, v := range supportedVersions {
		for _, asked := range p.ProtocolVersion {
			if v == asked {
				out.ProtocolVersion = append(out.ProtocolVersion, v)
				break
			}
		}
	}
	return out, nil
}

func (r *request) query(p *payloads.QueryRequestPayload) (kmip.OperationPayload, error) {
	out := &payloads.QueryResponsePayload{}
	for _, f := range p.QueryFunction {
		switch f {
		case kmip.QueryFunctionOperations:
			out.Operations = out.Operations[:0] // asked twice is answered once
			for op := kmip.OperationCreate; op <= kmip.OperationExport; op++ {
				if known, ok := r.server.operations[op]; ok && r.atLeast(known.since) {
					out.Operations = append(out.Operations, op)
				}
			}
		case kmip.QueryFunctionObjects:
			out.ObjectType = nil // asked twice is answered once
			for t := kmip.ObjectTypeCertificate; t <= kmip.ObjectTypePGPKey; t++ {
				if Keeps(t) && (t != kmip.ObjectTypePGPKey || r.atLeast(kmip.V1_2)) {
					out.ObjectType = append(out.ObjectType, t)
				}
			}
		case kmip.QueryFunctionServerInformation:
			out.VendorIdentification = r.server.vendor
		}
	}
	return out, nil
}
