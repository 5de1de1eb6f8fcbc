// Package admission bounds what clients can take of a network server before it
// is known who they are: connections, and requests in a second.
//
// A client is a network address; where said so, an IPv6 address counts as its
// network (/64), for whoever has one address there has all of them.
//
// Invariants: what one client is refused for, another is not; memory is bounded,
// however many clients there are.
//
// All types are safe for concurrent use.
package admission

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Slots counts what is open at once: connections, or requests. Make it with
// [NewSlots].
type Slots struct {
	total, perAddress int

	mu   sync.Mutex // guards all below
	open int
	from map[string]int // by address, and by IPv6 network
}

// NewSlots returns slots of which so many can be taken at once, together and from
// one address. All addresses of an IPv6 network together get three quarters.
func NewSlots(total, perAddress int) *Slots {
	return &Slots{total: total, perAddress: perAddress, from: map[string]int{}}
}

// Enter takes a slot for a peer, "host:port" or a host, or returns false if there is
// none for it. leave gives it back; it is called once.
func (s *Slots) Enter(peer string) (leave func(), ok bool) {
	address, network := AddressOf(peer), NetworkOf(peer)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open >= s.total || s.from[address] >= s.perAddress {
		return nil, false
	}
	if network != address && s.from[network] >= max(1, s.total*3/4) {
		return nil, false
	}
	s.add(address, network, 1)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.add(address, network, -1)
	}, true
}

func (s *Slots) add(address, network string, n int) {
	s.open += n
	keys := []string{address, network}
	if network == address {
		keys = keys[:1]
	}
	for _, key := range keys {
		if s.from[key] += n; s.from[key] == 0 {
			delete(s.from, key)
		}
	}
}

// AddressOf returns a peer's address without port and zone.
func AddressOf(peer string) string {
	if a, ok := parse(peer); ok {
		return a.String()
	}
	return peer
}

// NetworkOf is [AddressOf], but for an IPv6 address its network: "2001:db8::/64".
func NetworkOf(peer string) string {
	a, ok := parse(peer)
	switch {
	case !ok:
		return peer
	case a.Is4():
		return a.String()
	}
	return netip.PrefixFrom(a, 64).Masked().String()
}

func parse(peer string) (netip.Addr, bool) {
	host, _, err := net.SplitHostPort(peer)
	if err != nil {
		host = peer
	}
	a, err := netip.ParseAddr(host)
	return a.Unmap().WithZone(""), err == nil
}

// clientsMax is how many clients [Rates] remembers.
const clientsMax = 10_000

// Rates bounds how often clients do something. Make it with [NewRates].
type Rates struct {
	limit rate.Limit
	burst int

	mu      sync.Mutex               // guards clients
	clients map[string]*rate.Limiter // by network
}

// NewRates returns rates of so much a second, and twice as much at once.
func NewRates(perSecond int) *Rates {
	return &Rates{limit: rate.Limit(perSecond), burst: 2 * perSecond, clients: map[string]*rate.Limiter{}}
}

// Allow reports whether a peer may once more, now.
func (r *Rates) Allow(peer string, now time.Time) bool {
	key := NetworkOf(peer)
	r.mu.Lock()
	l := r.clients[key]
	if l == nil {
		r.makeRoom(now)
		l = rate.NewLimiter(r.limit, r.burst)
		r.clients[key] = l
	}
	r.mu.Unlock()
	return l.AllowN(now, 1)
}

// makeRoom forgets clients that were not heard of for a while. If all were, it
// forgets them all, which costs less than to refuse those who did nothing.
func (r *Rates) makeRoom(now time.Time) {
	if len(r.clients) < clientsMax {
		return
	}
	for key, l := range r.clients {
		if l.TokensAt(now) >= float64(r.burst) {
			delete(r.clients, key)
		}
	}
	if len(r.clients) >= clientsMax {
		clear(r.clients)
	}
}

// Listen has l give out only connections for which there are slots. Others are
// closed unanswered.
func Listen(l net.Listener, slots *Slots, log *slog.Logger) net.Listener {
	return &listener{Listener: l, slots: slots, log: log, say: rate.Sometimes{Interval: time.Second}}
}

type listener struct {
	net.Listener
	slots *Slots
	log   *slog.Logger
	say   rate.Sometimes // a flood must not fill the log
}

// Accept implements [net.Listener].
func (l *listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		peer := raw.RemoteAddr().String()
		if leave, ok := l.slots.Enter(peer); ok {
			return &conn{Conn: raw, leave: sync.OnceFunc(leave)}, nil
		}
		raw.Close()
		l.say.Do(func() {
			l.log.LogAttrs(context.Background(), slog.LevelWarn, "connection refused: too many are open", slog.String("peer", peer))
		})
	}
}

// conn gives its slot back when it is closed.
type conn struct {
	net.Conn
	leave func()
}

// Close implements [net.Conn].
func (c *conn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
