package inventory

import (
	"context"
	"net"
	"slices"
	"strings"

	"strongroom/internal/errs"
)

// A VM can run a part of the site: the controller, or a key server of a standard
// provider. If its own keys come by way of that part, nothing starts it once its
// host was restarted: it waits for itself, a circular dependency.

// PartController is the part of a site that is its controller.
const PartController = "controller"

const partProvider = "provider:"

// PartProvider is the part of a site that is the key servers of a provider.
func PartProvider(name string) string { return partProvider + name }

// NameController says by which names, or addresses, the machine of the controller
// is known. It is called before anything else is done with inv.
func (inv *Inventory) NameController(names ...string) { inv.controller = names }

// CheckParts returns those parts sorted and each once, or an error if there is
// one that no VM can run.
func (inv *Inventory) CheckParts(ctx context.Context, parts []string) ([]string, error) {
	for _, part := range parts {
		name, ok := strings.CutPrefix(part, partProvider)
		switch {
		case part == PartController:
			continue
		case !ok:
			return nil, errs.New(errs.Invalid, "%.80q is no part of a site", part).WithHint("it is controller, or provider:NAME")
		}
		p, err := inv.Provider(ctx, name)
		if err != nil {
			return nil, err
		}
		if p.Standard == nil {
			return nil, errs.New(errs.Invalid, "key provider %s has no key server that a VM could run: it is a %s one", name, p.Type).
				WithHint("hosts have its keys themselves; a VM with the controller runs the part controller")
		}
	}
	parts = slices.Clone(parts)
	slices.Sort(parts)
	return slices.Compact(parts), nil
}

// Circle returns how v, with keys of that provider, would wait for itself: what it
// needs, as words that follow "it needs". Empty if it would not.
func (inv *Inventory) Circle(ctx context.Context, v VM, provider string) (string, error) {
	providers, err := inv.Providers(ctx)
	if err != nil {
		return "", err
	}
	if s := inv.Site(providers, nil); len(s.Runs(v)) == 0 {
		return "", nil
	}
	vms, err := inv.VMs(ctx, "")
	if err != nil {
		return "", err
	}
	return inv.Site(providers, vms).circle(v, []string{provider}), nil
}

// NewCircle returns the first VM that would wait for itself if a standard provider were
// as changed says, and does not now, and how: "" and "" if there is none.
func (inv *Inventory) NewCircle(ctx context.Context, provider string, changed Standard) (vm, circle string, err error) {
	providers, err := inv.Providers(ctx)
	if err != nil {
		return "", "", err
	}
	vms, err := inv.VMs(ctx, "")
	if err != nil {
		return "", "", err
	}
	now := inv.Site(providers, vms)
	next := slices.Clone(providers)
	for i := range next {
		if next[i].Name == provider {
			next[i].Standard = &changed
		}
	}
	then := inv.Site(next, vms)
	for _, v := range vms {
		if circle := then.Circle(v); circle != "" && now.Circle(v) == "" {
			return v.Name, circle, nil
		}
	}
	return "", "", nil
}

// Parts returns the parts of the site that v runs; see [Site.Runs].
func (inv *Inventory) Parts(ctx context.Context, v VM) ([]string, error) {
	providers, err := inv.Providers(ctx)
	return inv.Site(providers, nil).Runs(v), err
}

// Site is who runs what, and who needs what to start. It does not change.
type Site struct {
	needs   map[string][]string // by provider: parts that a host which was restarted needs to have its keys
	byName  map[string][]string // by lower-case name of a machine: parts that it runs
	runners map[string][]VM     // by part
}

// Site returns the site of those providers and VMs.
func (inv *Inventory) Site(providers []Provider, vms []VM) Site {
	s := Site{needs: map[string][]string{}, byName: map[string][]string{}, runners: map[string][]VM{}}
	for _, name := range inv.controller {
		s.known(name, PartController)
	}
	for _, p := range providers {
		if p.Standard == nil {
			continue // hosts have its KDK in their sealed configuration
		}
		part := PartProvider(p.Name)
		s.needs[p.Name] = []string{part}
		if p.Standard.HostAccess != HostsDirect {
			s.needs[p.Name] = append(s.needs[p.Name], PartController)
		}
		for _, server := range p.Standard.Servers {
			if host, _, err := net.SplitHostPort(server.Address); err == nil {
				s.known(host, part)
			}
		}
	}
	for _, v := range vms {
		for _, part := range s.Runs(v) {
			s.runners[part] = append(s.runners[part], v)
		}
	}
	return s
}

// known notes that the machine of that name, or address, runs a part. A VM is known
// by a name as it is and by its first label, an address is no name.
func (s Site) known(host, part string) {
	if host == "" || net.ParseIP(host) != nil {
		return
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	label, _, _ := strings.Cut(host, ".")
	for _, name := range slices.Compact([]string{host, label}) {
		if !slices.Contains(s.byName[name], part) {
			s.byName[name] = append(s.byName[name], part)
		}
	}
}

// Runs returns the parts that v runs, sorted: those it was marked with, and those
// that its name tells of.
func (s Site) Runs(v VM) []string {
	parts := slices.Concat(v.Runs, s.byName[strings.ToLower(v.Name)])
	slices.Sort(parts)
	return slices.Compact(parts)
}

// Circle returns how v waits for itself with the keys that it has; see
// [Inventory.Circle].
func (s Site) Circle(v VM) string { return s.circle(v, providersOf(v)) }

func (s Site) circle(v VM, providers []string) string {
	runs := s.Runs(v)
	if len(runs) == 0 {
		return ""
	}
	seen := map[string]bool{}
	var walk func(providers []string) string
	walk = func(providers []string) string {
		for _, provider := range providers {
			for _, part := range s.needs[provider] {
				if slices.Contains(runs, part) {
					return partText(part) + ", which VM " + v.Name + " runs"
				}
				if seen[part] {
					continue
				}
				seen[part] = true
				for _, w := range s.runners[part] {
					if rest := walk(providersOf(w)); rest != "" {
						return partText(part) + ", which VM " + w.Name + " runs; that needs " + rest
					}
				}
			}
		}
		return ""
	}
	return walk(providers)
}

// partText is a part for people.
func partText(part string) string {
	if name, ok := strings.CutPrefix(part, partProvider); ok {
		return "key provider " + name
	}
	return "the " + part
}

// providersOf returns the providers of the keys that v needs to run, each once.
func providersOf(v VM) []string {
	var names []string
	for _, k := range v.RunKeys() {
		if !slices.Contains(names, k.Provider) {
			names = append(names, k.Provider)
		}
	}
	return names
}
