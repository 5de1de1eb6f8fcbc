package kms

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"strongroom/internal/control/store"
)

const (
	// backupLookEvery is how often a KMS looks how old its last backup is.
	backupLookEvery = time.Hour
	// backupReadTimeout bounds how long metrics wait for the database.
	backupReadTimeout = 2 * time.Second
	lastBackupKey     = "last"
)

// lastBackup is the last backup that was confirmed, by whichever node. A table of
// the database, "kms-backup", has it.
type lastBackup struct {
	ID        string    `json:"id"`
	Created   time.Time `json:"created"`
	OpensWith string    `json:"opensWith"`
	Revision  int64     `json:"revision"`
	Objects   int64     `json:"objects"`
	Keys      int64     `json:"keys"`
	Bytes     int64     `json:"bytes"`
	SHA256    string    `json:"sha256"`
}

func (k *KMS) backupTable() *store.Table[lastBackup] {
	return store.NewTable[lastBackup](k.db, "kms-backup", 1)
}

// noteBackup remembers a backup, unless a later one is known.
func (k *KMS) noteBackup(ctx context.Context, b lastBackup) error {
	return k.db.Txn(ctx, func(tx *store.Tx) error {
		t := k.backupTable().In(tx)
		last, err := t.Get(ctx, lastBackupKey)
		if err != nil && !store.IsNotFound(err) || err == nil && last.Created.After(b.Created) {
			return err
		}
		return t.Set(lastBackupKey, b)
	})
}

// lastBackup returns nil if there was none.
func (k *KMS) lastBackup(ctx context.Context) (*lastBackup, error) {
	last, err := k.backupTable().Get(ctx, lastBackupKey)
	if store.IsNotFound(err) {
		return nil, nil
	}
	return &last, err
}

func (c Config) backupMaxAge() time.Duration { return time.Duration(c.BackupMaxAgeHours) * time.Hour }

// backupOverdue reports whether the last backup is older than allowed. A KMS that
// never had one is as old as its CA.
func (k *KMS) backupOverdue(last *lastBackup, now time.Time) bool {
	since := k.ca.Certificate().NotBefore
	if last != nil {
		since = last.Created
	}
	return k.cfg.BackupMaxAgeHours > 0 && now.Sub(since) > k.cfg.backupMaxAge()
}

// backupMetrics gives Prometheus the age of the last backup.
type backupMetrics struct{ k *KMS }

// They are read only.
var (
	backupTime    = prometheus.NewDesc("strongroom_kms_last_backup_timestamp_seconds", "When the last confirmed backup was made, since 1970; 0: never.", nil, nil)
	backupOverdue = prometheus.NewDesc("strongroom_kms_backup_overdue", "1 if the last backup is older than backup_max_age_hours.", nil, nil)
)

// Describe implements [prometheus.Collector].
func (m *backupMetrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- backupTime
	ch <- backupOverdue
}

// Collect implements [prometheus.Collector]. Without the database it tells nothing.
func (m *backupMetrics) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), backupReadTimeout)
	defer cancel()
	last, err := m.k.lastBackup(ctx)
	if err != nil {
		return
	}
	at, overdue := 0.0, 0.0
	if last != nil {
		at = float64(last.Created.Unix())
	}
	if m.k.backupOverdue(last, time.Now()) {
		overdue = 1
	}
	ch <- prometheus.MustNewConstMetric(backupTime, prometheus.GaugeValue, at)
	ch <- prometheus.MustNewConstMetric(backupOverdue, prometheus.GaugeValue, overdue)
}
