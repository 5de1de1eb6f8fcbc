package standard

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/ovh/kmip-go"

	"strongroom/internal/crypto/keysafe"
	"strongroom/internal/errs"
	"strongroom/internal/keys/kmip/kmipclient"
)

// vendor is x-Vendor and x-Product of every key.
const vendor = "Strongroom"

// The components that keys are for.
const (
	ComponentVM       = "Virtual Machine"
	ComponentWrapping = "Wrapping Key" // of all VMs of a provider
	ComponentTrial    = "Trial Key"    // of [Provider.Probe]
)

// Labels are what is written to a key at the KMS for the people who look there,
// and for the installation that made it to know it again: the attributes that
// vCenter writes. A label for the installation is added.
type Labels struct {
	Identifier string // x-Identifier: the VM's UUID
	Component  string // x-Component: one of the above
	Name       string // x-Name: the VM's name, of a wrapping key the provider's
}

// ownerLabel has the installation that made the key: [Config.Installation].
const ownerLabel = "x-Controller"

// Label writes labels to a key, those that are not empty and not there yet. Not
// every KMS takes them, and no use of a key depends on them: an error is for the
// log.
func (p *Provider) Label(caller context.Context, ref keysafe.Ref, l Labels) error {
	ctx, done, err := p.begin(caller)
	if err != nil {
		return err
	}
	defer done()
	is, err := p.client.Describe(ctx, ref.KeyID)
	if err != nil {
		return err
	}
	for _, a := range [][2]string{ // the one that makes the key ours is the last
		{"x-Vendor", vendor}, {"x-Product", vendor}, {"x-Identifier", l.Identifier}, {"x-Component", l.Component}, {"x-Name", l.Name}, {ownerLabel, p.installation},
	} {
		if a[1] == "" || is.Labels[a[0]] == a[1] {
			continue
		}
		if err := p.client.SetCustom(ctx, ref.KeyID, a[0], a[1]); err != nil {
			return err
		}
	}
	return nil
}

// Key is what the KMS tells of a key that the installation made.
type Key struct {
	ID      string
	Name    string // by which the key is found whose Create was answered to nobody
	Labels  Labels
	Created time.Time // zero if the KMS does not tell
}

// ErrNotOurs is reported for a key whose labels do not say that this installation
// made it, and for one that is destroyed or not there.
var ErrNotOurs = errors.New("no key of this installation")

// ErrNoLabels is reported by [Provider.Mine] for a KMS that does not find keys by
// their labels.
var ErrNoLabels = errors.New("the key server does not find keys by their labels")

// Mine returns the identifiers of the keys that bear the label of the
// installation, as the KMS says. Not every KMS looks at labels: ask
// [Provider.Marks] of each.
func (p *Provider) Mine(caller context.Context) ([]string, error) {
	ctx, done, err := p.begin(caller)
	if err != nil {
		return nil, err
	}
	defer done()
	ids, err := p.client.Labelled(ctx, ownerLabel, p.installation)
	var refused *kmipclient.KMIPError
	if errors.As(err, &refused) && errs.KindOf(err) != errs.Denied {
		return nil, fmt.Errorf("%w: %w", ErrNoLabels, err)
	}
	return ids, p.outcome(caller, err)
}

// Marks returns what is known of those keys that the installation made, and that are
// not destroyed. The others are left out.
func (p *Provider) Marks(caller context.Context, ids []string) ([]Key, error) {
	ctx, done, err := p.begin(caller)
	if err != nil {
		return nil, err
	}
	defer done()
	described, err := p.client.DescribeAll(ctx, ids)
	if err != nil {
		return nil, p.outcome(caller, err)
	}
	var keys []Key
	for i, is := range described {
		k, err := p.ours(caller, ids[i], is.Description, is.Err)
		if errors.Is(err, ErrNotOurs) {
			continue
		}
		if err != nil {
			return nil, err
		}
		keys = append(keys, k)
	}
	return keys, nil
}

// mark returns what is known of a key that the installation made, or an error
// wrapping [ErrNotOurs].
func (p *Provider) mark(ctx, caller context.Context, id string) (Key, error) {
	is, err := p.client.Describe(ctx, id)
	return p.ours(caller, id, is, err)
}

func (p *Provider) ours(caller context.Context, id string, is kmipclient.Description, err error) (Key, error) {
	if errs.KindOf(err) == errs.NotFound {
		return Key{}, fmt.Errorf("%w: %w", ErrNotOurs, err)
	}
	if err != nil {
		return Key{}, p.outcome(caller, err)
	}
	if p.installation == "" || is.Labels[ownerLabel] != p.installation || is.Labels["x-Vendor"] != vendor || is.Labels["x-Product"] != vendor ||
		is.State == kmip.StateDestroyed || is.State == kmip.StateDestroyedCompromised {
		return Key{}, ErrNotOurs
	}
	return Key{
		ID: id, Name: is.Name, Created: is.Created,
		Labels: Labels{Identifier: is.Labels["x-Identifier"], Component: is.Labels["x-Component"], Name: is.Labels["x-Name"]},
	}, nil
}

// Deactivate ends the use of a key that the installation made, for good. One
// whose use has ended is no error. It returns an error wrapping [ErrNotOurs] and
// does nothing if the labels of the key say otherwise.
func (p *Provider) Deactivate(caller context.Context, id string) error {
	return p.change(caller, id, func(ctx context.Context, id string) error {
		return p.deactivate(ctx, id, kmip.RevocationReasonCodeCessationOfOperation)
	})
}

// Supersede ends the use of the wrapping key that [Provider.NewKEK] made for an
// object: see [Provider.SupersededKEK]. One whose use has ended, and one that is
// not there any more, is no error. The key is known by its Name: not every key
// server takes labels.
func (p *Provider) Supersede(caller context.Context, objectID uuid.UUID) error {
	ctx, done, err := p.begin(caller)
	if err != nil {
		return err
	}
	defer done()
	found, err := p.client.Find(ctx, nameOf(objectID))
	for _, id := range found {
		if err == nil {
			err = p.deactivate(ctx, id, kmip.RevocationReasonCodeSuperseded)
		}
	}
	if errs.KindOf(err) == errs.NotFound {
		return nil
	}
	return p.outcome(caller, err)
}

// Destroy has the KMS forget a key that the installation made and whose use has
// ended, as [Provider.Deactivate].
func (p *Provider) Destroy(caller context.Context, id string) error {
	return p.change(caller, id, p.client.Destroy)
}

func (p *Provider) change(caller context.Context, id string, do func(context.Context, string) error) error {
	ctx, done, err := p.begin(caller)
	if err != nil {
		return err
	}
	defer done()
	if _, err := p.mark(ctx, caller, id); err != nil {
		return err
	}
	return p.outcome(caller, do(ctx, id))
}

func (p *Provider) deactivate(ctx context.Context, id string, why kmip.RevocationReasonCode) error {
	state, err := p.client.State(ctx, id)
	if err != nil || state != kmip.StateActive {
		return err
	}
	return p.client.Revoke(ctx, id, why)
}
