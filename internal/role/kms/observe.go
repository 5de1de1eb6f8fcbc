package kms

import (
	"cmp"
	"context"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"strongroom/internal/control/audit"
	"strongroom/internal/control/directory"
	"strongroom/internal/control/guard"
	"strongroom/internal/daemon"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipserver"
)

const (
	// auditSignEvery is how long a record stays without a signature.
	auditSignEvery = time.Minute
	// refusedPerSecond bounds how many refused strangers are put on record: they
	// must not fill the disk. All are counted.
	refusedPerSecond = 10
)

// metrics are what Prometheus gets.
type metrics struct {
	registry   *prometheus.Registry
	operations *prometheus.CounterVec
	seconds    *prometheus.HistogramVec
	refused    prometheus.Counter
	steps      *prometheus.CounterVec

	mu     sync.Mutex
	second int64 // since 1970, in which so many refused were put on record:
	noted  int
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		operations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "strongroom_kms_operations_total", Help: "Operations of applications answered.",
		}, []string{"operation", "outcome"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "strongroom_kms_operation_seconds", Help: "Time from an operation's start to its result.",
			Buckets: []float64{.0001, .0005, .001, .005, .01, .05, .1, .5, 1, 5},
		}, []string{"operation"}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "strongroom_kms_refused_requests_total", Help: "Requests of clients that are not known or may not connect.",
		}),
	}
	m.steps = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "strongroom_kms_scheduled_steps_total", Help: "Steps that dates and rotation asked for.",
	}, []string{"step", "outcome"})
	m.registry.MustRegister(m.operations, m.seconds, m.refused, m.steps)
	return m
}

// note reports whether one more refused stranger is to be put on record.
func (m *metrics) note(now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if second := now.Unix(); second != m.second {
		m.second, m.noted = second, 0
	}
	m.noted++
	return m.noted <= refusedPerSecond
}

// observe counts operations and puts them on record before they are answered: what
// is not on record must not happen unseen.
func (k *KMS) observe(_ context.Context, events ...kmipserver.Event) error {
	durable := false
	var last audit.Head
	for _, e := range events {
		entry, ok := k.entryOf(e)
		if !ok {
			continue
		}
		head, err := k.audit.Append(entry)
		if err != nil {
			return err
		}
		last, durable = head, durable || changes(e.Operation) || e.Approval != ""
	}
	if !durable {
		return nil
	}
	return k.audit.Flush(last)
}

// entryOf counts an operation and returns its record, if it has one.
func (k *KMS) entryOf(e kmipserver.Event) (audit.Entry, bool) {
	if e.Operation == 0 {
		k.metrics.refused.Inc()
		if !k.metrics.note(time.Now()) {
			return audit.Entry{}, false
		}
	} else {
		name := operationName(e.Operation)
		k.metrics.operations.WithLabelValues(name, outcome(e.Reason)).Inc()
		k.metrics.seconds.WithLabelValues(name).Observe(e.Duration.Seconds())
		if trivial(e.Operation) {
			return audit.Entry{}, false
		}
	}
	by := cmp.Or(e.Client.Interface, "kmip") + "."
	entry := audit.Entry{
		Actor: e.Client.Name, Action: by + operationName(e.Operation), Object: "group/" + e.Client.Account, Outcome: outcome(e.Reason),
		Details: map[string]string{"peer": e.Peer},
	}
	if e.Operation == 0 {
		entry.Action = by + "connect"
	}
	if e.Client.Name == "" {
		entry.Actor, entry.Object = guard.Anonymous, "kms"
	} else {
		entry.Details["account"] = directory.AccountOf(e.Client.Account)
	}
	if e.Object != "" {
		entry.Object += "/key/" + e.Object
	}
	if e.Reason != 0 {
		entry.Details["reason"] = ttlv.EnumStr(e.Reason)
	}
	if e.Cause != "" {
		entry.Details["cause"] = e.Cause
	}
	if e.Approval != "" {
		entry.Details["approval"] = e.Approval
	}
	return entry, true
}

// operationName names an operation that this server has; of others clients
// could make up any number.
func operationName(op kmip.Operation) string {
	if !known[op] {
		return "other"
	}
	return ttlv.EnumStr(op)
}

// known is read only.
var known = func() map[kmip.Operation]bool {
	m := map[kmip.Operation]bool{}
	for _, op := range kmipserver.Operations() {
		m[op] = true
	}
	return m
}()

func outcome(reason kmip.ResultReason) string {
	switch reason {
	case 0:
		return audit.Success
	case kmip.ResultReasonPermissionDenied, kmip.ResultReasonAuthenticationNotSuccessful:
		return audit.Denied
	}
	return audit.Failed
}

// keepAudit makes records durable, and signs them, also when no more come.
func (k *KMS) keepAudit(ctx context.Context) error {
	flush, sign := time.NewTicker(flushEvery), time.NewTicker(auditSignEvery)
	defer flush.Stop()
	defer sign.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-flush.C:
			err = k.audit.Flush(k.audit.Head())
		case <-sign.C:
			err = k.audit.Checkpoint()
		}
		if err != nil {
			k.log.LogAttrs(ctx, slog.LevelError, "audit log not written", slog.Any("err", err))
		}
	}
}

// metricsServer serves metrics and health, without secrets.
func (k *KMS) metricsServer() *http.Server {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(k.metrics.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
		defer cancel()
		if err := k.healthy(ctx); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Write([]byte("ok\n"))
	})
	return &http.Server{Handler: mux, ReadHeaderTimeout: daemon.HeaderTimeout, MaxHeaderBytes: daemon.HeaderMax}
}

// healthy tells whether keys can be had and made: the database answers and the
// audit log can be written.
func (k *KMS) healthy(ctx context.Context) error {
	if _, err := k.db.Revision(ctx); err != nil {
		return errs.Wrap(err, "database")
	}
	return errs.Wrap(k.audit.Flush(k.audit.Head()), "audit log")
}
