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
		file := filepath.Join(t.TempDir(), "case.xml")
		if err := os.WriteFile(file, []byte(altered), 0o600); err != nil {
			t.Fatal(err)
		}
		client := ca.Client(t, strconv.Itoa(i)) // an account each
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
		if (r.Reason == "") != (c.want == "") || !strings.Contains(r.Reason, c.want) {
			t.Errorf("%d: got %q, want %q", i, r.Reason, c.want)
		}
	}
}
