package kms

import (
	"context"
	"errors"
	"math"
	"time"

	"connectrpc.com/connect"
	"github.com/ovh/kmip-go"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/timestamppb"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/directory"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/role/kms/usage"
)

// admit returns what [kmipserver.Client] has for the operations of c: they
// are counted, and refused beyond a quota. KMIP 1.4 has no reason of its own for
// that: it is Permission Denied, with a message.
func (k *KMS) admit(c usage.Client) func(context.Context, kmip.Operation, int) (func(error), error) {
	return func(ctx context.Context, op kmip.Operation, makes int) (func(error), error) {
		if trivial(op) {
			return func(error) {}, nil
		}
		done, err := k.usage.Admit(ctx, c, int64(makes))
		if exceeded := (*usage.Exceeded)(nil); errors.As(err, &exceeded) {
			return nil, &kmipserver.Refusal{Reason: kmip.ResultReasonPermissionDenied, Message: exceeded.Error(), Cause: causeQuota + exceeded.What + " of " + string(exceeded.Subject)}
		}
		if err != nil {
			return nil, err
		}
		return func(err error) { done(err == nil) }, nil
	}
}

func quotaOf(q directory.Quota) *strongroomv1.KMSQuota {
	return &strongroomv1.KMSQuota{Keys: q.Keys, Operations: q.Operations, PeriodSeconds: int64(q.Period / time.Second)}
}

// readQuota reads a quota off the wire; what it may be the directory checks.
func readQuota(q *strongroomv1.KMSQuota) (directory.Quota, error) {
	if s := q.GetPeriodSeconds(); s < 0 || s > math.MaxInt32 {
		return directory.Quota{}, errs.New(errs.Invalid, "there is no period of %d seconds", s)
	}
	return directory.Quota{Keys: q.GetKeys(), Operations: q.GetOperations(), Period: time.Duration(q.GetPeriodSeconds()) * time.Second}, nil
}

func usageOf(c usage.Counters, q directory.Quota) *strongroomv1.KMSUsage {
	out := &strongroomv1.KMSUsage{Operations: c.Operations, Keys: c.Made, Refused: c.Refused}
	if !c.LastUse.IsZero() {
		out.LastUse = timestamppb.New(c.LastUse)
	}
	if done, ends := c.In(q, time.Now()); !ends.IsZero() {
		out.PeriodOperations, out.PeriodEnds = done, timestamppb.New(ends)
	}
	return out
}

func (a *api) SetKMSGroupQuota(ctx context.Context, req *connect.Request[strongroomv1.SetKMSGroupQuotaRequest]) (*connect.Response[strongroomv1.KMSGroup], error) {
	q, err := readQuota(req.Msg.GetQuota())
	if err == nil {
		err = a.k.directory.SetGroupQuota(ctx, req.Msg.GetName(), q)
	}
	if err != nil {
		return nil, err
	}
	return a.group(ctx, req.Msg.GetName())
}

func (a *api) SetKMSApplicationQuota(ctx context.Context, req *connect.Request[strongroomv1.SetKMSApplicationQuotaRequest]) (*connect.Response[strongroomv1.KMSApplication], error) {
	q, err := readQuota(req.Msg.GetQuota())
	if err == nil {
		err = a.k.directory.SetApplicationQuota(ctx, req.Msg.GetName(), q)
	}
	if err != nil {
		return nil, err
	}
	return a.application(req.Msg.GetName())
}

// usageMetrics gives Prometheus the usage of all applications and groups.
type usageMetrics struct{ k *KMS }

// They are read only. Groups and applications have their names in their account.
var (
	applicationLabels     = []string{"account", "group", "application"}
	applicationOperations = prometheus.NewDesc("strongroom_kms_application_operations_total", "Operations of an application that were carried out.", applicationLabels, nil)
	applicationMade       = prometheus.NewDesc("strongroom_kms_application_keys_made_total", "Keys that an application has made.", applicationLabels, nil)
	applicationRefused    = prometheus.NewDesc("strongroom_kms_application_quota_refusals_total", "Operations of an application refused because of a quota.", applicationLabels, nil)
	applicationLastUse    = prometheus.NewDesc("strongroom_kms_application_last_use_timestamp_seconds", "When an application was used last, since 1970.", applicationLabels, nil)
	groupKeys             = prometheus.NewDesc("strongroom_kms_group_keys", "Keys of a group that are not destroyed.", []string{"account", "group"}, nil)
	groupKeysLimit        = prometheus.NewDesc("strongroom_kms_group_keys_limit", "Quota of keys of a group that has one.", []string{"account", "group"}, nil)
	accountKeys           = prometheus.NewDesc("strongroom_kms_account_keys", "Keys of an account that are not destroyed.", []string{"account"}, nil)
	accountKeysLimit      = prometheus.NewDesc("strongroom_kms_account_keys_limit", "Quota of keys of an account that has one.", []string{"account"}, nil)
)

// Describe implements [prometheus.Collector].
func (u *usageMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		applicationOperations, applicationMade, applicationRefused, applicationLastUse, groupKeys, groupKeysLimit, accountKeys, accountKeysLimit,
	} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector].
func (u *usageMetrics) Collect(ch chan<- prometheus.Metric) {
	for _, app := range u.k.directory.Applications() {
		c := u.k.usage.Of(usage.Application(app.Name))
		account, own := directory.SplitName(app.Name)
		_, group := directory.SplitName(app.Group)
		send := func(d *prometheus.Desc, t prometheus.ValueType, v float64) {
			ch <- prometheus.MustNewConstMetric(d, t, v, account, group, own)
		}
		send(applicationOperations, prometheus.CounterValue, float64(c.Operations))
		send(applicationMade, prometheus.CounterValue, float64(c.Made))
		send(applicationRefused, prometheus.CounterValue, float64(c.Refused))
		if !c.LastUse.IsZero() {
			send(applicationLastUse, prometheus.GaugeValue, float64(c.LastUse.Unix()))
		}
	}
	// What is not counted yet is not told, rather than wrong.
	gauge := func(d *prometheus.Desc, v int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	for _, g := range u.k.directory.Groups() {
		account, own := directory.SplitName(g.Name)
		if n, ok := u.k.objects.Counted(g.Name); ok {
			gauge(groupKeys, n, account, own)
		}
		if g.Quota.Keys > 0 {
			gauge(groupKeysLimit, g.Quota.Keys, account, own)
		}
	}
	for _, a := range u.k.directory.Accounts() {
		if n, ok := u.k.keysOf(a.Name); ok {
			gauge(accountKeys, n, a.Name)
		}
		if a.Quota.Keys > 0 {
			gauge(accountKeysLimit, a.Quota.Keys, a.Name)
		}
	}
}
