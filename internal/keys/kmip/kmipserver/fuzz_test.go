package kmipserver

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/keys/kmip/kmipwire"
	"strongroom/internal/keys/kmip/testca"
)

type wrapVector struct{ kek, clear, wrapped []byte }

func (v wrapVector) key(t testing.TB) *keymem.Key {
	t.Helper()
	k, err := keymem.Take(bytes.Clone(v.kek))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

// wrapVectors are those of RFC 3394 sections 4.1, 4.3 and 4.6.
var wrapVectors = []wrapVector{
	{unhex("000102030405060708090A0B0C0D0E0F"), unhex("00112233445566778899AABBCCDDEEFF"), unhex("1FA68B0A8112B447AEF34BD8FB5A7B829D3E862371D2CFE5")},
	{unhex("000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F"), unhex("00112233445566778899AABBCCDDEEFF"), unhex("64E8C3F9CE0F5BA263E9777905818A2A93C8191E7D6E8AE7")},
	{unhex("000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F"), unhex("00112233445566778899AABBCCDDEEFF000102030405060708090A0B0C0D0E0F"), unhex("28C9F404C4B810F4CBCCB35CFB87F8263F5786E2D80ED326CBC7F0E71A99F43BFB988B9B7A02DD21")},
}

func seeds() [][]byte {
	id := "0b1c2d3e-0000-4000-8000-000000000001"
	var out [][]byte
	for _, v := range []kmip.ProtocolVersion{kmip.V1_0, kmip.V1_2, kmip.V1_4} {
		for _, p := range [][]kmip.OperationPayload{
			{newKey()},
			{newKey(), &payloads.ActivateRequestPayload{}, &payloads.GetRequestPayload{}, &payloads.RekeyRequestPayload{}},
			{&payloads.LocateRequestPayload{MaximumItems: 1, Attribute: []kmip.Attribute{{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: "x", NameType: 1}}}}},
			{newKey(), &payloads.RevokeRequestPayload{RevocationReason: kmip.RevocationReason{RevocationReasonCode: 2}}, &payloads.DestroyRequestPayload{}},
			{&payloads.QueryRequestPayload{QueryFunction: []kmip.QueryFunction{1, 2, 3}}, &payloads.DiscoverVersionsRequestPayload{}},
			{newKey(), &payloads.EncryptRequestPayload{Data: make([]byte, 16), CryptographicParameters: &kmip.AES_GCM}},
			{
				newPair(kmip.CryptographicAlgorithmECDSA, 256), &payloads.ActivateRequestPayload{}, &payloads.GetRequestPayload{KeyFormatType: kmip.KeyFormatTypePKCS_8},
				&payloads.SignRequestPayload{Data: make([]byte, 16), CryptographicParameters: &kmip.CryptographicParameters{HashingAlgorithm: kmip.HashingAlgorithmSHA_256}},
			},
			{newKey(usage(kmip.CryptographicUsageDeriveKey)), &deriveRequest{ObjectType: kmip.ObjectTypeSecretData, DerivationMethod: byHMAC, DerivationParameters: derivationParameters{Salt: []byte("salt"), IterationCount: 1}}},
			{newKey(), &payloads.GetAttributesRequestPayload{UniqueIdentifier: id}, &payloads.AddAttributeRequestPayload{Attribute: kmip.Attribute{AttributeName: "x-a", AttributeValue: "b"}}},
		} {
			m := kmip.NewRequestMessage(v, p...)
			out = append(out, ttlv.MarshalTTLV(&m))
		}
	}
	return out
}

func quietServer(t testing.TB, config *tls.Config) (*Server, *Memory) {
	t.Helper()
	store := NewMemory()
	s, err := New(Config{
		Store: store, Authenticate: byCommonName, Log: slog.New(noErrors{t}),
		TLS: config, Limits: Limits{Message: 1 << 16, Values: 500, Batch: 8},
	})
	if err != nil {
		t.Fatal(err)
	}
	return s, store
}

// noErrors is a log in which a panic or a failure of the server's own is an
// error of the test.
type noErrors struct{ t testing.TB }

func (noErrors) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelError }

func (l noErrors) Handle(_ context.Context, r slog.Record) error {
	text := r.Message
	r.Attrs(func(a slog.Attr) bool { text += " " + a.String(); return true })
	l.t.Error(text)
	return nil
}

func (l noErrors) WithAttrs([]slog.Attr) slog.Handler { return l }

func (l noErrors) WithGroup(string) slog.Handler { return l }

// checkAnswer asserts that an answer is one well-formed response.
func checkAnswer(t *testing.T, answer []byte) {
	t.Helper()
	if err := kmipwire.Check(answer, Limits{}.withDefaults().wire()); err != nil {
		t.Errorf("the answer is not TTLV: %v", err)
	}
	var m kmip.ResponseMessage
	if err := ttlv.UnmarshalTTLV(answer, &m); err != nil {
		t.Errorf("the answer is not a response: %v", err)
	}
	if len(m.BatchItem) == 0 || int(m.Header.BatchCount) != len(m.BatchItem) {
		t.Errorf("the answer has %d items and counts %d", len(m.BatchItem), m.Header.BatchCount)
	}
}

// FuzzMessage gives a server anything; what it takes for a message it must
// answer with a well-formed one.
func FuzzMessage(f *testing.F) {
	for _, s := range seeds() {
		f.Add(s)
	}
	ca := testca.New(f)
	state := tls.ConnectionState{PeerCertificates: []*x509.Certificate{ca.Client(f, "fuzz").Leaf}}
	config := TLSConfig(ca.Server(f), ca.Pool(), false)
	f.Fuzz(func(t *testing.T, in []byte) {
		s, store := quietServer(t, config)
		defer store.Close()
		message, err := kmipwire.Read(bytes.NewReader(in), kmip.TagRequestMessage, s.limits.wire())
		if err != nil {
			if message != nil {
				t.Error("an error came with a message")
			}
			if answer, ok := s.answerMalformed(err); ok {
				checkAnswer(t, answer)
			}
			return
		}
		checkAnswer(t, s.answer(context.Background(), &connection{state: state, peer: "fuzz"}, message))
	})
}

// TestSocketSurvivesNoise sends 10,000 damaged messages over real connections:
// each is answered or its connection closed, and the server goes on.
func TestSocketSurvivesNoise(t *testing.T) {
	t.Parallel()
	b := newBench(t, Limits{Request: 2 * time.Second})
	sessions := tls.NewLRUClientSessionCache(4)
	client := b.ca.Client(t, "noise")
	dial := func() *tls.Conn {
		conn, err := tls.Dial("tcp", b.addr, &tls.Config{RootCAs: b.ca.Pool(), Certificates: []tls.Certificate{client}, ClientSessionCache: sessions})
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	var random [8]byte
	all := seeds()
	conn := dial()
	defer func() { conn.Close() }()
	connections := 1
	for i := range 10000 {
		rand.Read(random[:])
		message := bytes.Clone(all[i%len(all)])
		for j := range 1 + int(random[6])%3 {
			// Not the message's own header: then it would be waited for.
			message[8+(int(random[2*j])<<8|int(random[2*j+1]))%(len(message)-8)] ^= 1 << (random[7] % 8)
		}
		conn.SetDeadline(time.Now().Add(patience))
		if _, err := conn.Write(message); err == nil {
			header := make([]byte, 8)
			if _, err := io.ReadFull(conn, header); err == nil {
				length := binary.BigEndian.Uint32(header[4:])
				body := make([]byte, length)
				if _, err := io.ReadFull(conn, body); err != nil {
					t.Fatalf("message %d (%x): the answer ended early: %v", i, message, err)
				}
				checkAnswer(t, append(header, body...))
				continue
			}
		}
		conn.Close()
		conn = dial()
		connections++
	}
	t.Logf("%d connections", connections)
	m := kmip.NewRequestMessage(kmip.V1_4, newKey())
	if r := b.dial(t, "after").send(&m); r.BatchItem[0].Err() != nil {
		t.Errorf("afterwards: %v", r.BatchItem[0].Err())
	}
}
