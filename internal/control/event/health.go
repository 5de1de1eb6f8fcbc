package event

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"strongroom/internal/control/inventory"
	"strongroom/internal/errs"
)

// Status of a health check, in vSphere's colours.
type Status string

// The colours.
const (
	Green  Status = "green"
	Yellow Status = "yellow"
	Red    Status = "red"
)

// Check is the result of one health check.
type Check struct {
	Name    string // what should be
	Status  Status
	Message string // what is wrong; empty if nothing
	Hint    string
	Runbook string // below docs
	Checked time.Time
}

// world is what the checks look at.
type world struct {
	hosts     []inventory.Host
	vms       []inventory.VM
	providers []inventory.Provider
	site      inventory.Site
	now       time.Time
}

func (l *Log) look(ctx context.Context, inv *inventory.Inventory) (w world, err error) {
	w.now = l.now()
	if w.hosts, err = inv.Hosts(ctx, ""); err != nil {
		return w, err
	}
	if w.vms, err = inv.VMs(ctx, ""); err != nil {
		return w, err
	}
	w.providers, err = inv.Providers(ctx)
	w.site = inv.Site(w.providers, w.vms)
	return w, err
}

// conditions returns where the alarm is true.
func (w world) conditions(alarmID string) []Condition {
	var out []Condition
	switch alarmID {
	case AlarmProviderNotBackedUp:
		for _, p := range w.providers {
			if p.State == inventory.NotBackedUp {
				out = append(out, Condition{"provider/" + p.Name, map[string]string{"provider": p.Name}})
			}
		}
	case AlarmNoDefaultProvider:
		if !slices.ContainsFunc(w.providers, func(p inventory.Provider) bool { return p.Default }) {
			out = append(out, Condition{})
		}
	case AlarmProviderNotOnHosts:
		for _, p := range w.providers {
			if p.Type == inventory.Native && p.State == inventory.Warning {
				out = append(out, Condition{"provider/" + p.Name, map[string]string{
					"provider": p.Name, "details": strings.TrimSuffix(strings.Join(p.Details, " "), "."),
				}})
			}
		}
	case AlarmProviderMissing:
		users := map[string][]string{}
		for _, v := range w.vms {
			for _, k := range v.Keys() {
				here := slices.ContainsFunc(w.providers, func(p inventory.Provider) bool { return p.Name == k.Provider })
				if !here && !slices.Contains(users[k.Provider], v.Name) {
					users[k.Provider] = append(users[k.Provider], v.Name)
				}
			}
		}
		for p, vms := range users {
			out = append(out, Condition{"provider/" + p, map[string]string{"provider": p, "vms": some(vms)}})
		}
	case AlarmVMLocked:
		for _, v := range w.vms {
			if v.CryptoState == inventory.Locked {
				out = append(out, Condition{"vm/" + v.Name, map[string]string{"vm": v.Name, "reason": v.LockReason}})
			}
		}
	case AlarmCircular:
		for _, v := range w.vms {
			if circle := w.site.Circle(v); circle != "" {
				out = append(out, Condition{"vm/" + v.Name, map[string]string{"vm": v.Name, "circle": circle}})
			}
		}
	case AlarmHostNotResponding:
		for _, h := range w.hosts {
			// A host that has only joined is not expected to answer yet.
			if h.State == inventory.NotResponding && !h.LastSeen.IsZero() {
				out = append(out, Condition{"host/" + h.Name, map[string]string{"host": h.Name}})
			}
		}
	}
	for _, p := range w.providers {
		if p.Standard != nil {
			out = append(out, w.keyServerConditions(alarmID, p)...)
		}
	}
	slices.SortFunc(out, func(a, b Condition) int { return strings.Compare(a.Target, b.Target) })
	return out
}

// keyServerConditions returns where the alarms on standard providers are true
// of p.
func (w world) keyServerConditions(alarmID string, p inventory.Provider) []Condition {
	var out []Condition
	add := func(target, server, details string) {
		out = append(out, Condition{target, map[string]string{"provider": p.Name, "server": server, "details": strings.TrimSuffix(details, ".")}})
	}
	target := "provider/" + p.Name
	switch alarmID {
	case AlarmProviderNotEstablished:
		if p.State == inventory.NotEstablished {
			add(target, "", strings.Join(p.Details, " "))
		}
	case AlarmRotationOverdue:
		if late := p.Standard.Wrapping.Overdue(w.now); late != "" {
			add(target, "", late)
		}
	case AlarmClientCertificate:
		if ending := p.Standard.Certificate.Ending(w.now); ending != "" {
			add(target, "", ending)
		}
	}
	for _, s := range p.Standard.Servers {
		ending := s.Certificate.Ending(w.now)
		switch {
		case alarmID == AlarmKeyServer && s.Problem != "":
			add(target+"/"+s.Address, s.Address, s.Message)
		case alarmID == AlarmServerCertificate && s.ClientTrustServer && ending != "":
			add(target+"/"+s.Address, s.Address, ending)
		}
	}
	return out
}

// some lists the first of many names.
func some(names []string) string {
	const shown = 5
	if len(names) <= shown {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:shown], ", "), len(names)-shown)
}

// Evaluate raises and clears all alarms by what the inventory says now. It is
// called when something changed, and from time to time.
func (l *Log) Evaluate(ctx context.Context, inv *inventory.Inventory) error {
	l.evaluating.Lock()
	defer l.evaluating.Unlock()
	w, err := l.look(ctx, inv)
	if err != nil {
		return errs.Wrap(err, "cannot evaluate alarms")
	}
	for _, a := range l.alarms {
		if err := l.Sync(ctx, a.ID, w.conditions(a.ID)); err != nil {
			return err
		}
	}
	return nil
}

// Health makes all checks now. It changes nothing.
func (l *Log) Health(ctx context.Context, inv *inventory.Inventory) ([]Check, error) {
	w, err := l.look(ctx, inv)
	if err != nil {
		return nil, errs.Wrap(err, "cannot check health")
	}
	now := l.now()
	var checks []Check
	for _, a := range l.alarms {
		c := Check{Name: a.Check, Status: Green, Runbook: a.Runbook(), Checked: now}
		t := l.types[a.Raised]
		var messages []string
		for _, cond := range w.conditions(a.ID) {
			messages = append(messages, fill(t.Text, withCommon(cond.Args, New{Target: cond.Target})))
			if c.Hint == "" {
				c.Hint = fill(a.Hint, cond.Args)
			}
		}
		if len(messages) > 0 {
			c.Status, c.Message = Yellow, some(messages)
			if t.Severity == Error {
				c.Status = Red
			}
		}
		checks = append(checks, c)
	}
	return checks, nil
}
