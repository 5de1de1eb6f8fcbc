package kms

import (
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"strongroom/api/apierr"
	strongroomv1 "strongroom/api/strongroom/v1"
)

// TestQuotas has an application reach its group's quota of keys and its own of
// operations; counters outlive a restart.
func TestQuotas(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	ctx, admin := t.Context(), b.admin(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(apierr.From(err))
		}
	}
	ok := func(item kmip.ResponseBatchItem) {
		t.Helper()
		must(item.Err())
	}
	conn := dial(t, b.addr, tlsOf(t, dir, first(t, dir)))
	group, err := admin.SetKMSGroupQuota(ctx, connect.NewRequest(&strongroomv1.SetKMSGroupQuotaRequest{Name: FirstGroup, Quota: &strongroomv1.KMSQuota{Keys: 2}}))
	must(err)
	if group.Msg.GetQuota().GetKeys() != 2 || group.Msg.GetUsage().GetKeys() != 0 {
		t.Errorf("the group as changed: %v", group.Msg)
	}
	pair := &payloads.CreateKeyPairRequestPayload{CommonTemplateAttribute: &kmip.TemplateAttribute{Attribute: []kmip.Attribute{
		{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmECDSA},
		{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
		{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageSign},
	}}}
	var ids []string
	for i := range 2 {
		if i == 1 {
			if item := ask(t, conn, nil, pair); item.ResultReason != kmip.ResultReasonPermissionDenied || !strings.Contains(item.ResultMessage, "2 keys") {
				t.Errorf("a pair of which one key is beyond the quota: %v, %q", item.ResultReason, item.ResultMessage)
			}
		}
		item := ask(t, conn, nil, newAES(""))
		must(item.Err())
		ids = append(ids, item.ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier)
	}
	item := ask(t, conn, nil, newAES(""))
	if item.ResultReason != kmip.ResultReasonPermissionDenied || !strings.Contains(item.ResultMessage, "quota of group/default is reached: 2 keys") {
		t.Errorf("a key beyond the quota: %v, %q", item.ResultReason, item.ResultMessage)
	}
	ok(ask(t, conn, nil, &payloads.DestroyRequestPayload{UniqueIdentifier: ids[0]}))
	ok(ask(t, conn, nil, newAES("")))

	t.Log("operations")
	_, err = admin.SetKMSApplicationQuota(ctx, connect.NewRequest(&strongroomv1.SetKMSApplicationQuotaRequest{Name: FirstApplication, Quota: &strongroomv1.KMSQuota{Operations: 3, PeriodSeconds: 365 * 24 * 3600}}))
	must(err)
	get := &payloads.GetRequestPayload{UniqueIdentifier: ids[1]}
	for range 3 {
		ok(ask(t, conn, nil, get))
	}
	if item := ask(t, conn, nil, get); item.ResultReason != kmip.ResultReasonPermissionDenied || !strings.Contains(item.ResultMessage, "quota of application/first is reached: 3 operations until ") {
		t.Errorf("an operation beyond the quota: %v, %q", item.ResultReason, item.ResultMessage)
	}
	ok(ask(t, conn, nil, &payloads.DiscoverVersionsRequestPayload{}))

	usage := func() *strongroomv1.KMSUsage {
		t.Helper()
		app, err := b.admin(t).GetKMSApplication(ctx, connect.NewRequest(&strongroomv1.GetKMSApplicationRequest{Name: FirstApplication}))
		must(err)
		group, err := b.admin(t).GetKMSGroup(ctx, connect.NewRequest(&strongroomv1.GetKMSGroupRequest{Name: FirstGroup}))
		must(err)
		a, g := app.Msg.GetUsage(), group.Msg.GetUsage()
		if g.GetKeys() != 2 || g.GetOperations() != a.GetOperations() || g.GetRefused() != 3 {
			t.Errorf("usage of the group: %v", g)
		}
		return a
	}
	before := usage()
	if before.GetOperations() != 7 || before.GetKeys() != 3 || before.GetRefused() != 3 || before.GetPeriodOperations() != 3 || time.Since(before.GetLastUse().AsTime()) > time.Hour {
		t.Errorf("usage: %v", before)
	}
	b.wantMetrics(t, `strongroom_kms_application_operations_total{account="default",application="first",group="default"} 7`, `strongroom_kms_group_keys{account="default",group="default"} 2`,
		`strongroom_kms_group_keys_limit{account="default",group="default"} 2`, `strongroom_kms_application_quota_refusals_total{account="default",application="first",group="default"} 3`)
	b.stop()
	b.checkAudit(t, "application:first kmip.Create group/default denied", "application:first kmip.Get group/default denied",
		"local administrator KMSService/SetKMSGroupQuota group/default success", "local administrator KMSService/SetKMSApplicationQuota application/first success")
	b = start(t, dir)
	if after := usage(); after.String() != before.String() {
		t.Errorf("usage after a restart: %v, was %v", after, before)
	}
	conn = dial(t, b.addr, tlsOf(t, dir, first(t, dir)))
	if item := ask(t, conn, nil, get); item.ResultReason != kmip.ResultReasonPermissionDenied {
		t.Errorf("beyond the quota, after a restart: %v", item.ResultReason)
	}
}

func (b *bench) wantMetrics(t *testing.T, want ...string) {
	t.Helper()
	server := b.metricsServer()
	w := httptest.NewRecorder()
	server.Handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for _, line := range want {
		if !strings.Contains(w.Body.String(), line+"\n") {
			t.Errorf("not in the metrics: %s", line)
		}
	}
}
