package standard

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/google/uuid"

	"strongroom/internal/crypto/keymem"
	"strongroom/internal/keys/keyprovider"
	"strongroom/internal/keys/kmip/kmipclient"
)

// ErrProbe is reported by [Provider.Probe] for a KMS that answers and gives no
// key.
var ErrProbe = errors.New("the key server answers, but gives no key")

// Status checks all servers side by side. It takes as long as the slowest,
// within three times the timeout, makes no key and uses none.
func (p *Provider) Status(ctx context.Context) ([]kmipclient.Condition, error) {
	ctx, done, err := p.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	found := make([]kmipclient.Condition, len(p.servers))
	var wg sync.WaitGroup
	for i, addr := range p.servers {
		wg.Go(func() { found[i] = p.single[i].Check(ctx, addr) })
	}
	wg.Wait()
	return found, nil
}

// Probe makes a key, gets it from every server, and destroys it: what a status
// cannot tell. A KMS of another region or account answers, and gives no key; a
// server that does not share the keys of the others gives another or none.
//
// It returns nil, or an error wrapping [ErrProbe] or one of those of
// [Provider.NewKEK]. A key that could not be destroyed is named.
func (p *Provider) Probe(ctx context.Context) error {
	id := uuid.New()
	err := p.probe(ctx, id)
	if errors.Is(err, keyprovider.ErrClosed) {
		return err
	}
	// Also when ctx has ended: Discard has deadlines of its own.
	if left := p.Discard(context.WithoutCancel(ctx), id); left != nil {
		err = errors.Join(err, fmt.Errorf("the trial key %s may be left at the key server: %w", nameOf(id), left))
	}
	return err
}

func (p *Provider) probe(ctx context.Context, id uuid.UUID) error {
	ref, kek, err := p.NewKEK(ctx, id)
	switch {
	case errors.Is(err, keyprovider.ErrLocked), errors.Is(err, keyprovider.ErrNotFound):
		return fmt.Errorf("%w (is this the right region, and the right account?): %w", ErrProbe, err)
	case err != nil:
		return err
	}
	defer kek.Close()
	// So that it is found again if nobody comes to destroy it. Not every KMS takes
	// labels.
	_ = p.Label(ctx, ref, Labels{Component: ComponentTrial})
	for i, addr := range p.servers {
		if err := p.sameAt(ctx, i, ref.KeyID, kek); err != nil {
			return fmt.Errorf("%w: server %s does not have the key that another one made; all servers of a provider must share their keys: %w", ErrProbe, addr, err)
		}
	}
	return nil
}

// sameAt reports whether a server has that key. One that cannot be reached is
// for the status to tell.
func (p *Provider) sameAt(ctx context.Context, server int, id string, want *keymem.Key) error {
	ctx, done, err := p.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	got, err := p.single[server].Get(ctx, id)
	var refused *kmipclient.KMIPError
	if err != nil && !errors.As(err, &refused) {
		return nil
	}
	if err != nil {
		return err
	}
	defer got.Close()
	if !got.Equal(want) {
		return errors.New("it has another key of that identifier")
	}
	return nil
}
