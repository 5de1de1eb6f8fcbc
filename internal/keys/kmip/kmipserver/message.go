package kmipserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"runtime/debug"
	"slices"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipwire"
)

// Refusal is an error that a client is told about: a reason of KMIP 1.4
// section 9.1.3.2.29 and a sentence. Every other error reaches the client as
// General Failure without its text.
type Refusal struct {
	Reason  kmip.ResultReason
	Message string
	Cause   string // what refused it, for records: "quota"; not sent
}

// Error implements error.
func (r *Refusal) Error() string { return r.Message }

func refuse(reason kmip.ResultReason, format string, args ...any) error {
	return &Refusal{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// request is one message while it is answered.
type request struct {
	ctx     context.Context // of this one request; batch items get it from here
	server  *Server
	client  Client
	conn    *connection
	version kmip.ProtocolVersion
	now     time.Time
	// placeholder is the ID Placeholder (KMIP 1.4 section 4): what the batch's
	// items before this one made or found, or "".
	placeholder string
	object      string              // what the item under way is about, for the record
	approval    string              // that the item under way used up, for the record
	wipe        [][]byte            // ordinary memory with key material in it
	forget      []*kmip.KeyMaterial // numbers in ordinary memory, wiped with it
	secretSize  int                 // bytes of key material in the answer
	unavailable bool                // what the last item needs cannot be had now
	tx          Tx                  // that items of the batch share, while they do; else nil
	made        []*keymem.Key       // of objects that are in tx and in no store yet
}

func (r *request) atLeast(v kmip.ProtocolVersion) bool {
	return ttlv.CompareVersions(r.version, v) >= 0
}

// id returns the object an item is about: the one given, or the placeholder.
func (r *request) id(given string) (string, error) {
	if given == "" {
		given = r.placeholder
	}
	if given == "" {
		return "", refuse(kmip.ResultReasonItemNotFound, "no Unique Identifier was given and the ID Placeholder is empty")
	}
	r.object = given
	return given, nil
}

// reveal returns a copy of k in ordinary memory, for the codec. It is wiped
// when the answer has been encoded.
func (r *request) reveal(k *keymem.Key) []byte {
	b := make([]byte, k.Len())
	copy(b, k.Bytes())
	r.conceal(b)
	r.secretSize += len(b)
	return b
}

// conceal has b wiped when the answer has been encoded.
func (r *request) conceal(b []byte) { r.wipe = append(r.wipe, b) }

// clean wipes what was revealed and concealed.
func (r *request) clean() {
	for _, b := range r.wipe {
		keymem.Wipe(b)
	}
	for _, m := range r.forget {
		forget(m)
	}
}

// item is one decoded item of a batch.
type item struct {
	operation kmip.Operation
	id        []byte
	payload   kmip.OperationPayload
	extension *kmip.MessageExtension
	err       error       // why payload could not be decoded
	progress  progress    // of its admission
	done      func(error) // once it was admitted
	refused   error       // why it was not admitted
}

// progress is how far an item has come with [Client.Admit].
type progress uint8

const (
	unasked progress = iota
	admitted
	ended // or refused
)

// envelope is a decoded message.
type envelope struct {
	header kmip.RequestHeader
	items  []item
}

// decode decodes a checked message. Payloads whose fields do not fit their
// operation are an error of their item, not of the message.
func (s *Server) decode(message []byte) (e envelope, err error) {
	defer func() {
		if p := recover(); p != nil { // the codec panics on some values of the wrong type
			err = kmipwire.Malformed("%v", p)
		}
	}()
	d, err := ttlv.NewTTLVDecoder(message)
	if err != nil {
		return envelope{}, err
	}
	err = d.Struct(kmip.TagRequestMessage, func(d *ttlv.Decoder) error {
		if err := d.TagAny(kmip.TagRequestHeader, &e.header); err != nil {
			return err
		}
		for d.Tag() == kmip.TagBatchItem {
			if len(e.items) == s.limits.Batch {
				return kmipwire.Malformed("over %d batch items", s.limits.Batch)
			}
			var it item
			if err := d.Struct(kmip.TagBatchItem, func(d *ttlv.Decoder) error { return s.decodeItem(d, &it) }); err != nil {
				return err
			}
			e.items = append(e.items, it)
		}
		if d.Tag() != 0 {
			return kmipwire.Malformed("a %s after the batch", ttlv.TagString(d.Tag()))
		}
		return nil
	})
	return e, err
}

func (s *Server) decodeItem(d *ttlv.Decoder, it *item) error {
	if err := d.TagAny(kmip.TagOperation, &it.operation); err != nil {
		return err
	}
	if err := d.Opt(kmip.TagUniqueBatchItemID, &it.id); err != nil {
		return err
	}
	if d.Tag() != kmip.TagRequestPayload {
		return kmipwire.Malformed("a batch item without Request Payload")
	}
	if op, ok := s.operations[it.operation]; ok {
		// From here a fault is this item's alone; the cursor must move on.
		it.payload = op.payload()
		it.err = decodePayload(d, it.payload)
	}
	if d.Tag() == kmip.TagRequestPayload {
		if err := d.Next(); err != nil {
			return err
		}
	}
	return d.Opt(kmip.TagMessageExtension, &it.extension)
}

func decodePayload(d *ttlv.Decoder, payload kmip.OperationPayload) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v", p)
		}
	}()
	return d.TagAny(kmip.TagRequestPayload, payload)
}

var supportedVersions = []kmip.ProtocolVersion{kmip.V1_4, kmip.V1_3, kmip.V1_2, kmip.V1_1, kmip.V1_0}

func supports(v kmip.ProtocolVersion) bool {
	return v.ProtocolVersionMajor == 1 && v.ProtocolVersionMinor >= 0 && v.ProtocolVersionMinor <= 4
}

// answer runs the batch of message and returns the encoded response.
func (s *Server) answer(ctx context.Context, c *connection, message []byte) []byte {
	e, err := s.decode(message)
	version := e.header.ProtocolVersion
	if !supports(version) {
		// Also when the rest of the message is not what this server knows: a
		// client of KMIP 2 must be told the version, not a parse error.
		if version == (kmip.ProtocolVersion{}) {
			version = kmip.V1_0
			return s.refuseMessage(version, refuse(kmip.ResultReasonInvalidMessage, "the message is not a KMIP request"))
		}
		return s.refuseMessage(kmip.V1_4, refuse(kmip.ResultReasonInvalidMessage, "protocol version %v is not supported", version))
	}
	r := &request{ctx: ctx, server: s, conn: c, version: version, now: s.now().Truncate(time.Second).UTC()}
	defer r.clean()
	for _, it := range e.items {
		r.concealPayload(it.payload)
	}
	if err == nil {
		err = s.checkHeader(e)
	}
	if err == nil {
		err = r.authenticate(e.header.Authentication)
	}
	if unavailable(err) {
		return nil
	}
	if err != nil {
		return s.refuseMessage(version, err)
	}
	response := newResponse(version, r.now)
	defer func() {
		for i := range e.items { // that were not reached
			e.items[i].end(errNotReached)
		}
	}()
	single := 0 // items before this one are run one by one
	for i := 0; i < len(e.items); {
		var out []kmip.ResponseBatchItem
		if n := r.shared(e.items[i:]); n > 1 && i >= single {
			if out = r.runShared(e.items[i : i+n]); out == nil {
				single = i + n
			}
		}
		if out == nil {
			out = []kmip.ResponseBatchItem{r.run(&e.items[i])}
		}
		if r.unavailable {
			return nil
		}
		failed := slices.IndexFunc(out, func(o kmip.ResponseBatchItem) bool { return o.ResultStatus != kmip.ResultStatusSuccess })
		if failed >= 0 && e.header.BatchErrorContinuationOption != kmip.BatchErrorContinuationOptionContinue {
			response.BatchItem = append(response.BatchItem, out[:failed+1]...)
			break
		}
		response.BatchItem = append(response.BatchItem, out...)
		i += len(out)
	}
	limit := s.limits.Answer
	if most := int(e.header.MaximumResponseSize); most > 0 {
		limit = min(limit, most)
	}
	return encodeResponse(response, r.secretSize, limit)
}

// checkHeader refuses what a whole message may not ask for.
func (s *Server) checkHeader(e envelope) error {
	h := e.header
	switch {
	case int(h.BatchCount) != len(e.items) || len(e.items) == 0:
		return refuse(kmip.ResultReasonInvalidMessage, "the batch count is %d and there are %d items", h.BatchCount, len(e.items))
	case h.BatchErrorContinuationOption > kmip.BatchErrorContinuationOptionUndo:
		return refuse(kmip.ResultReasonInvalidField, "unknown Batch Error Continuation Option %d", h.BatchErrorContinuationOption)
	case h.BatchErrorContinuationOption == kmip.BatchErrorContinuationOptionUndo && len(e.items) > 1:
		return refuse(kmip.ResultReasonFeatureNotSupported, "a batch cannot be undone by this server")
	case h.MaximumResponseSize < 0:
		return refuse(kmip.ResultReasonInvalidField, "a negative Maximum Response Size")
	case h.TimeStamp != nil && h.TimeStamp.Unix() < 0:
		return refuse(kmip.ResultReasonInvalidField, "a Time Stamp before 1970")
	}
	return nil
}

func (r *request) authenticate(a *kmip.Authentication) error {
	var credentials []kmip.Credential
	if a != nil {
		credentials = append(append(credentials, a.Credential), a.AdditionalCredential...)
	}
	client, err := r.server.authenticate(r.ctx, r.conn.state, credentials)
	r.conn.known = err == nil
	if err == nil {
		r.client = client
		return nil
	}
	if unavailable(err) {
		r.server.log.LogAttrs(r.ctx, slog.LevelError, "kmip client not looked up", slog.String("peer", r.conn.peer), slog.Any("err", err))
		return err
	}
	r.server.log.LogAttrs(r.ctx, slog.LevelInfo, "kmip client refused", slog.String("peer", r.conn.peer), slog.Any("err", err))
	told := (*Refusal)(nil)
	if !errors.As(err, &told) {
		client, told = Client{}, &Refusal{Reason: kmip.ResultReasonAuthenticationNotSuccessful, Message: "who you are could not be established"}
	}
	if err := r.server.observe(r.ctx, Event{Client: client, Peer: r.conn.peer, Reason: told.Reason, Cause: told.Cause}); err != nil {
		r.server.log.LogAttrs(r.ctx, slog.LevelError, "kmip refusal not recorded", slog.Any("err", err))
	}
	return told
}

// unavailable reports whether an error means that this server cannot know the
// answer now, and that another may. The connection is closed then, without an
// answer: that is what has a client turn to its next server, and ask there what
// became of its request. An answer would be final.
func unavailable(err error) bool {
	told := (*Refusal)(nil)
	return errs.KindOf(err) == errs.Unavailable && !errors.As(err, &told)
}

// run answers one item; it never panics.
func (r *request) run(it *item) (out kmip.ResponseBatchItem) {
	out = kmip.ResponseBatchItem{Operation: it.operation, UniqueBatchItemID: it.id}
	defer func() {
		if p := recover(); p != nil {
			r.server.log.LogAttrs(r.ctx, slog.LevelError, "kmip operation panicked",
				slog.String("op", ttlv.EnumStr(it.operation)), slog.Any("err", p), slog.String("stack", string(debug.Stack())))
			fail(&out, errPanicked)
		}
	}()
	began := time.Now()
	r.object, r.approval = "", ""
	payload, err := r.perform(it)
	err = r.record(err, r.event(it.operation, time.Since(began), err))
	if err != nil {
		if it.operation == kmip.OperationLocate || makes(it.payload) > 0 {
			r.placeholder = "" // what follows is not about an object of before
		}
		r.failed(it.operation, &out, err)
		return out
	}
	out.ResponsePayload = payload
	return out
}

// failed makes out the answer to an item that failed.
func (r *request) failed(op kmip.Operation, out *kmip.ResponseBatchItem, err error) {
	var told *Refusal
	if !errors.As(err, &told) {
		r.server.log.LogAttrs(r.ctx, slog.LevelError, "kmip operation failed", slog.String("op", ttlv.EnumStr(op)), slog.Any("err", err))
	}
	r.unavailable = unavailable(err)
	fail(out, err)
}

func (r *request) perform(it *item) (payload kmip.OperationPayload, err error) {
	if err := r.allowed(it.operation); err != nil {
		return nil, err
	}
	op, ok := r.server.operations[it.operation]
	switch {
	case !ok || !r.atLeast(op.since):
		return nil, refuse(kmip.ResultReasonOperationNotSupported, "operation %s is not supported in KMIP %v", ttlv.EnumStr(it.operation), r.version)
	case it.extension != nil && it.extension.CriticalityIndicator:
		return nil, refuse(kmip.ResultReasonFeatureNotSupported, "message extension of %q is not supported", it.extension.VendorIdentification)
	case r.secretSize > r.server.limits.Answer:
		return nil, refuse(kmip.ResultReasonResponseTooLarge, "the response would be over %d bytes", r.server.limits.Answer)
	case it.err != nil:
		return nil, refuse(kmip.ResultReasonInvalidMessage, "the payload of %s is not well formed", ttlv.EnumStr(it.operation))
	}
	err = r.admitted(it, func() (err error) {
		payload, err = op.run(r, it.payload)
		return err
	})
	return payload, err
}

// allowed refuses an operation that the client's policy does not allow.
func (r *request) allowed(op kmip.Operation) error {
	if r.client.Policy.allows(op) {
		return nil
	}
	return refuse(kmip.ResultReasonPermissionDenied, "operation %s is not allowed to you", ttlv.EnumStr(op))
}

// admitted runs an item if it is admitted.
func (r *request) admitted(it *item, run func() error) (err error) {
	if err := r.ctx.Err(); err != nil { // what is left of a batch would take longer still
		return errs.New(errs.Unavailable, "the request took too long: %w", err)
	}
	if err := r.admit(it); err != nil {
		return err
	}
	err = errPanicked
	defer func() { it.end(err) }()
	err = run()
	return err
}

// admit asks, once, whether an item may be run.
func (r *request) admit(it *item) error {
	if it.progress != unasked {
		return it.refused
	}
	it.progress, it.done = admitted, func(error) {}
	if r.client.Admit != nil {
		it.done, it.refused = r.client.Admit(r.ctx, it.operation, makes(it.payload))
	}
	if it.refused != nil {
		it.progress = ended
	}
	return it.refused
}

// end says, once, what came of an item that was admitted.
func (it *item) end(err error) {
	if it.progress == admitted {
		it.progress = ended
		it.done(err)
	}
}

// errNotReached is what came of an item behind one that failed.
var errNotReached = errors.New("not reached")

// errPanicked is what came of an operation that did not return.
var errPanicked = errors.New("panic")

func fail(out *kmip.ResponseBatchItem, err error) {
	out.ResultStatus = kmip.ResultStatusOperationFailed
	out.ResponsePayload = nil
	var told *Refusal
	if errors.As(err, &told) {
		out.ResultReason, out.ResultMessage = told.Reason, told.Message
		return
	}
	out.ResultReason, out.ResultMessage = kmip.ResultReasonGeneralFailure, "the server failed; its log says why"
}

func newResponse(v kmip.ProtocolVersion, now time.Time) *kmip.ResponseMessage {
	return &kmip.ResponseMessage{Header: kmip.ResponseHeader{ProtocolVersion: v, TimeStamp: now}}
}

// refuseMessage answers a message that was not run: one failed item without
// an operation (KMIP 1.4 section 7.2).
func (s *Server) refuseMessage(v kmip.ProtocolVersion, err error) []byte {
	if !errors.As(err, new(*Refusal)) {
		err = refuse(kmip.ResultReasonInvalidMessage, "the message is not well formed")
	}
	response := newResponse(v, s.now())
	var out kmip.ResponseBatchItem
	fail(&out, err)
	response.BatchItem = append(response.BatchItem, out)
	return encodeResponse(response, 0, math.MaxInt)
}

// answerMalformed returns the answer to what is not TTLV; there is none for a
// connection that broke.
func (s *Server) answerMalformed(err error) ([]byte, bool) {
	if !errors.Is(err, kmipwire.ErrMalformed) {
		return nil, false
	}
	return s.refuseMessage(kmip.V1_0, refuse(kmip.ResultReasonInvalidMessage, "the message is not well formed, or too large")), true
}

// encodeResponse encodes response, whose payloads hold secrets bytes of key
// material. If that takes more than limit bytes, every payload is replaced by
// Response Too Large (KMIP 1.4 section 6.3).
func encodeResponse(response *kmip.ResponseMessage, secrets, limit int) []byte {
	response.Header.BatchCount = int32(len(response.BatchItem))
	room := 0
	if secrets > 0 {
		room = 4096 + 1024*len(response.BatchItem) + 2*secrets
	}
	if answer, ok := encode(response, room, limit); ok {
		return answer
	}
	for i := range response.BatchItem {
		fail(&response.BatchItem[i], refuse(kmip.ResultReasonResponseTooLarge, "the response would be over %d bytes", limit))
	}
	answer, _ := encode(response, 0, math.MaxInt)
	return answer
}

// blank is what the encoder is given to make room; most answers need less. It is
// read only.
var blank [16 << 10]byte

// encode makes room bytes of room first, so that with key material the
// encoder's buffer does not grow and leave a copy in an abandoned one. It gives up
// at the first item that takes the answer over limit bytes.
func encode(response *kmip.ResponseMessage, room, limit int) (answer []byte, ok bool) {
	enc := ttlv.NewTTLVEncoder()
	if room > 0 {
		zeros := blank[:]
		if room > len(zeros) {
			zeros = make([]byte, room)
		}
		enc.ByteString(kmip.TagKeyMaterial, zeros[:room])
		enc.Clear()
	}
	ok = true
	enc.Struct(kmip.TagResponseMessage, func(enc *ttlv.Encoder) {
		enc.TagAny(kmip.TagResponseHeader, &response.Header)
		for i := range response.BatchItem {
			if enc.TagAny(kmip.TagBatchItem, &response.BatchItem[i]); len(enc.Bytes()) > limit {
				ok = false
				return
			}
		}
	})
	if !ok {
		keymem.Wipe(enc.Bytes())
		return nil, false
	}
	return enc.Bytes(), true
}
