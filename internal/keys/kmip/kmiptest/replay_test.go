package kmiptest_test

import (
	"context"
	"crypto/tls"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/keys/kmip/kmiptest"
	"strongroom/internal/keys/kmip/kmiptest/conform"
	"strongroom/internal/keys/kmip/testca"
)

// casesVariable names another folder of cases to replay.
const casesVariable = "STRONGROOM_KMIP_CASES"

func TestCases(t *testing.T) {
	t.Parallel()
	folder := os.Getenv(casesVariable)
	if folder == "" {
		folder = "testdata"
	}
	store := kmipserver.NewMemory()
	t.Cleanup(func() { store.Close() })
	conform.Cases(t, folder, store)
}

// TestDifferencesAreSeen replays a case with its expected responses altered.
func TestDifferencesAreSeen(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("testdata/v1.3/SKLC-M-1-13.xml")
	if err != nil {
		t.Fatal(err)
	}
	ca := testca.New(t)
	store := kmipserver.NewMemory()
	t.Cleanup(func() { store.Close() })
	addr := conform.Serve(t, ca, store)
	for i, c := range []struct{ old, new, want string }{
		{"", "", ""},
		{`<ResultStatus type="Enumeration" value="Success"/>`, `<ResultStatus type="Enumeration" value="OperationFailed"/>`, "ResultStatus"},
		{`<ResultStatus type="Enumeration" value="Success"/>`, "", "ResultStatus is not expected"},
		{`<AttributeValue type="Enumeration" value="PreActive"/>`, `<AttributeValue type="Enumeration" value="Active"/>`, "AttributeValue"},
		{`<BatchCount type="Integer" value="1"/>`, `<BatchCount type="LongInteger" value="1"/>`, "BatchCount"},
		{`<UniqueIdentifier type="TextString" value="$UNIQUE_IDENTIFIER_0"/>`, `<UniqueIdentifier type="TextString" value="$UNIQUE_IDENTIFIER_9"/>`, ""},
	} {
		altered := strings.ReplaceAll(string(source), c.old, c.new)
		if c.old == "" {
			altered = string(source)
		} else if altered == string(source) {
			t.Fatalf("%d: the case has no %s", i, c.old)
		}
		r := replayAltered(t, ca, addr, strconv.Itoa(i), altered)
		if (r.Reason == "") != (c.want == "") || !strings.Contains(r.Reason, c.want) {
			t.Errorf("%d: got %q, want %q", i, r.Reason, c.want)
		}
	}
}

// replayAltered replays a case with an account of its own.
func replayAltered(t *testing.T, ca *testca.Authority, addr, account, source string) kmiptest.Result {
	t.Helper()
	file := filepath.Join(t.TempDir(), "case.xml")
	if err := os.WriteFile(file, []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	client := ca.Client(t, account)
	r, err := kmiptest.Replay(t.Context(), file, func(ctx context.Context) (*tls.Conn, error) {
		conn, err := (&tls.Dialer{Config: &tls.Config{RootCAs: ca.Pool(), Certificates: []tls.Certificate{client}}}).DialContext(ctx, "tcp", addr)
		if err != nil {
			return nil, err
		}
		return conn.(*tls.Conn), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestAnsweredAtOnce replays the case of an asynchronous Locate against a server
// that answers at once: its answers must be those that the case polls for.
func TestAnsweredAtOnce(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("testdata/v1.0/TC_32_10_Asynchronous_Locate.xml")
	if err != nil {
		t.Fatal(err)
	}
	ca := testca.New(t)
	store := kmipserver.NewMemory()
	t.Cleanup(func() { store.Close() })
	addr := conform.Serve(t, ca, store)
	if r := replayAltered(t, ca, addr, "as it is", string(source)); !r.Passed() || !r.AtOnce {
		t.Errorf("got %+v, want it to pass, answered at once", r)
	}
	before, after, _ := strings.Cut(string(source), "# TIME 2")
	polled, after, _ := strings.Cut(after, "# TIME 3")
	polled = strings.Replace(polled, `value="Success"`, `value="OperationFailed"`, 1)
	if r := replayAltered(t, ca, addr, "altered", before+"# TIME 2"+polled+"# TIME 3"+after); !strings.Contains(r.Reason, "message 1") || !strings.Contains(r.Reason, "ResultStatus") {
		t.Errorf("got %+v, want a difference of the first answer", r)
	}
}
