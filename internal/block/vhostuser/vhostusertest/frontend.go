// Package vhostusertest is a front end of the vhost-user protocol and a driver
// of virtio block devices in one: what QEMU and a guest are to package
// vhostuser. Tests use it as a peer, as an attacker, and as a load generator. It
// shares no code with the back end.
//
// A [Frontend] holds the guest's memory and the connection; it is used by one
// goroutine. Each [Queue] is used by one goroutine at a time.
package vhostusertest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Features that a driver may accept.
const (
	FeatureReadOnly    = 1 << 5
	FeatureFlush       = 1 << 9
	FeatureConfigWCE   = 1 << 11
	FeatureMQ          = 1 << 12
	FeatureDiscard     = 1 << 13
	FeatureWriteZeroes = 1 << 14
	FeatureIndirect    = 1 << 28
	FeatureEventIdx    = 1 << 29
	featureProtocol    = 1 << 30
	FeatureVersion1    = 1 << 32

	// Also the limits and the topology, bits 1, 2, 6 and 10, which need no doing.
	knownFeatures = 1<<1 | 1<<2 | 1<<6 | 1<<10 | FeatureReadOnly | FeatureFlush | FeatureConfigWCE | FeatureMQ |
		FeatureDiscard | FeatureWriteZeroes | FeatureIndirect | FeatureEventIdx | featureProtocol | FeatureVersion1

	protocolInflight = 1 << 12
	// MQ, REPLY_ACK, BACKEND_REQ, CONFIG, CONFIGURE_MEM_SLOTS.
	knownProtocol = 1<<0 | 1<<3 | 1<<5 | 1<<9 | protocolInflight | 1<<15
)

// Requests of the protocol.
const (
	GetFeatures         = 1
	SetFeatures         = 2
	SetOwner            = 3
	SetMemTable         = 5
	SetVringNum         = 8
	SetVringAddr        = 9
	SetVringBase        = 10
	GetVringBase        = 11
	SetVringKick        = 12
	SetVringCall        = 13
	SetVringErr         = 14
	GetProtocolFeatures = 15
	SetProtocolFeatures = 16
	GetQueueNum         = 17
	SetVringEnable      = 18
	SetBackendReqFD     = 21
	GetConfig           = 24
	SetConfig           = 25
	GetInflightFD       = 31
	SetInflightFD       = 32
	GetMaxMemSlots      = 36
	AddMemReg           = 37
	RemMemReg           = 38
)

// Where memory is, for the guest and for the front end.
const (
	GuestBase = 0x1_0000_0000
	UserBase  = 0x7f00_0000_0000
)

// Options says what a Frontend is. Zero fields have the stated defaults.
type Options struct {
	Queues    int    // default 1
	QueueSize int    // default 128
	Slots     int    // requests under way in a queue; default 32
	DataSize  int    // bytes of data of a slot; default 1 MiB
	Without   uint64 // features not to accept
	Scatter   bool   // data lie in single pages in reverse order
	Slots36   bool   // memory is passed by ADD_MEM_REG
	// Whole passes memory as one region. Else it is two, and some buffers are in
	// both, which a guest's memory allows and few drivers do.
	Whole bool
	// Memory, if not nil, makes the file of the guest's memory. Default: a memfd
	// that may be sealed.
	Memory func(size int64) (*os.File, error)
	// Timeout is for every reply and completion. Default one minute.
	Timeout time.Duration
}

// Frontend is a front end.
type Frontend struct {
	Features uint64 // accepted
	Mem      []byte // the guest's memory
	MemFile  *os.File
	Queues   []*Queue

	opts     Options
	conn     *net.UnixConn
	back     *os.File // our end of the back end's channel
	tracks   bool     // the back end notes requests in work
	inflight *os.File
	area     []byte // inflight description
}

var ne = binary.NativeEndian

// Dial connects to a back end, and starts all queues.
func Dial(path string, opts Options) (*Frontend, error) {
	def := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	def(&opts.Queues, 1)
	def(&opts.QueueSize, 128)
	def(&opts.Slots, 32)
	def(&opts.DataSize, 1<<20)
	if opts.Timeout == 0 {
		opts.Timeout = time.Minute
	}
	if opts.Memory == nil {
		opts.Memory = func(size int64) (*os.File, error) {
			fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
			if err != nil {
				return nil, err
			}
			f := os.NewFile(uintptr(fd), "guest")
			return f, f.Truncate(size)
		}
	}
	f := &Frontend{opts: opts}
	if err := f.open(path); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (f *Frontend) open(path string) error {
	size := f.layout()
	var err error
	if f.MemFile, err = f.opts.Memory(size); err != nil {
		return err
	}
	if f.Mem, err = unix.Mmap(int(f.MemFile.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return err
	}
	for _, q := range f.Queues {
		if err := q.open(); err != nil {
			return err
		}
	}
	if err := f.Connect(path); err != nil {
		return err
	}
	return f.Start()
}

// Connect makes a new connection and negotiates. The queues do not run before
// Start.
func (f *Frontend) Connect(path string) error {
	f.Disconnect()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return err
	}
	f.conn = conn
	offered, err := f.CallU64(GetFeatures)
	if err != nil {
		return err
	}
	f.Features = offered & knownFeatures &^ f.opts.Without
	protocol, err := f.CallU64(GetProtocolFeatures)
	if err != nil {
		return err
	}
	protocol &= knownProtocol
	f.tracks = protocol&protocolInflight != 0
	if err := f.SendU64(SetProtocolFeatures, protocol); err != nil {
		return err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	f.back = os.NewFile(uintptr(pair[0]), "back")
	defer unix.Close(pair[1])
	return errors.Join(f.Send(SetBackendReqFD, nil, pair[1]), f.Send(SetOwner, nil))
}

// Start starts the queues where they stand.
func (f *Frontend) Start() error {
	if err := f.SendU64(SetFeatures, f.Features); err != nil {
		return err
	}
	if f.tracks {
		if err := f.setInflight(); err != nil {
			return err
		}
	}
	if err := f.SetMemory(); err != nil {
		return err
	}
	for _, q := range f.Queues {
		if err := q.Start(); err != nil {
			return err
		}
	}
	return nil
}

func (f *Frontend) setInflight() error {
	if f.inflight == nil {
		want := make([]byte, 24) // with QEMU's padding
		ne.PutUint16(want[16:], uint16(f.opts.Queues))
		ne.PutUint16(want[18:], uint16(f.opts.QueueSize))
		area, fds, err := f.Call(GetInflightFD, want)
		if err != nil {
			return err
		}
		if len(fds) != 1 || len(area) != len(want) {
			return fmt.Errorf("in-flight memory comes as %d bytes with %d descriptors", len(area), len(fds))
		}
		f.area, f.inflight = area, os.NewFile(uintptr(fds[0]), "inflight")
	}
	return f.Send(SetInflightFD, f.area, int(f.inflight.Fd()))
}

// NewInflight forgets the requests in work, as a reset of the device does.
func (f *Frontend) NewInflight() error {
	f.inflight.Close()
	f.inflight = nil
	return f.setInflight()
}

// SetMemory passes the guest's memory.
func (f *Frontend) SetMemory() error {
	region := func(b []byte, off, size int) []byte {
		for _, v := range []uint64{GuestBase + uint64(off), uint64(size), UserBase + uint64(off), uint64(off)} {
			b = ne.AppendUint64(b, v)
		}
		return b
	}
	half := len(f.Mem) / 2 &^ 4095
	fd := int(f.MemFile.Fd())
	if f.opts.Whole {
		return f.Send(SetMemTable, region(ne.AppendUint64(nil, 1), 0, len(f.Mem)), fd)
	}
	if f.opts.Slots36 {
		return errors.Join(
			f.Send(AddMemReg, region(make([]byte, 8), half, len(f.Mem)-half), fd),
			f.Send(AddMemReg, region(make([]byte, 8), 0, half), fd))
	}
	b := ne.AppendUint64(nil, 2)
	b = region(b, 0, half)
	b = region(b, half, len(f.Mem)-half)
	return f.Send(SetMemTable, b, fd, fd)
}

// Send sends a request and waits for its acknowledgement.
func (f *Frontend) Send(request uint32, payload []byte, fds ...int) error {
	b, _, err := f.exchange(request, 1|1<<3, payload, fds)
	if err != nil {
		return err
	}
	if len(b) != 8 || ne.Uint64(b) != 0 {
		return fmt.Errorf("request %d is refused: %x", request, b)
	}
	return nil
}

// SendU64 is Send of a number.
func (f *Frontend) SendU64(request uint32, v uint64) error {
	// These come before acknowledgements are agreed on.
	if request == SetProtocolFeatures {
		return f.SendRaw(request, 1, ne.AppendUint64(nil, v))
	}
	return f.Send(request, ne.AppendUint64(nil, v))
}

// SendState is Send of a queue's number.
func (f *Frontend) SendState(request, index, num uint32) error {
	return f.Send(request, ne.AppendUint32(ne.AppendUint32(nil, index), num))
}

// Call sends a request that has a reply of its own.
func (f *Frontend) Call(request uint32, payload []byte) ([]byte, []int, error) {
	return f.exchange(request, 1, payload, nil)
}

// CallU64 is Call for a number.
func (f *Frontend) CallU64(request uint32) (uint64, error) {
	b, _, err := f.Call(request, nil)
	if err != nil {
		return 0, err
	}
	if len(b) != 8 {
		return 0, fmt.Errorf("reply to %d has %d bytes", request, len(b))
	}
	return ne.Uint64(b), nil
}

// Config returns size bytes of the configuration space.
func (f *Frontend) Config(size int) ([]byte, error) {
	b := ne.AppendUint32(nil, 0)
	b = ne.AppendUint32(b, uint32(size))
	b = ne.AppendUint32(b, 0)
	got, _, err := f.Call(GetConfig, append(b, make([]byte, size)...))
	if err != nil {
		return nil, err
	}
	if len(got) != 12+size {
		return nil, fmt.Errorf("configuration of %d bytes comes as %d", size, len(got))
	}
	return got[12:], nil
}

// Size returns the disk's size in bytes.
func (f *Frontend) Size() (int64, error) {
	b, err := f.Config(60)
	if err != nil {
		return 0, err
	}
	return int64(binary.LittleEndian.Uint64(b)) * 512, nil
}

// SetWriteback sets the cache mode.
func (f *Frontend) SetWriteback(on bool) error {
	b := ne.AppendUint32(nil, 32)
	b = ne.AppendUint32(b, 1)
	b = ne.AppendUint32(b, 0)
	if on {
		return f.Send(SetConfig, append(b, 1))
	}
	return f.Send(SetConfig, append(b, 0))
}

// SendRaw sends a message as it is.
func (f *Frontend) SendRaw(request, flags uint32, payload []byte, fds ...int) error {
	b := ne.AppendUint32(nil, request)
	b = ne.AppendUint32(b, flags)
	b = ne.AppendUint32(b, uint32(len(payload)))
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err := f.conn.WriteMsgUnix(append(b, payload...), oob, nil)
	return err
}

func (f *Frontend) exchange(request, flags uint32, payload []byte, fds []int) ([]byte, []int, error) {
	if err := f.SendRaw(request, flags, payload, fds...); err != nil {
		return nil, nil, err
	}
	if err := f.conn.SetReadDeadline(time.Now().Add(f.opts.Timeout)); err != nil {
		return nil, nil, err
	}
	head, oob := make([]byte, 12), make([]byte, 64)
	n, oobn, _, _, err := f.conn.ReadMsgUnix(head, oob)
	if err != nil {
		return nil, nil, fmt.Errorf("no reply to request %d: %w", request, err)
	}
	if _, err := io.ReadFull(f.conn, head[n:]); err != nil {
		return nil, nil, fmt.Errorf("no reply to request %d: %w", request, err)
	}
	var got []int
	if oobn > 0 {
		parts, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			return nil, nil, err
		}
		if got, err = unix.ParseUnixRights(&parts[0]); err != nil {
			return nil, nil, err
		}
	}
	if ne.Uint32(head) != request || ne.Uint32(head[4:]) != 1|1<<2 {
		return nil, got, fmt.Errorf("reply to %d is %x", request, head)
	}
	b := make([]byte, ne.Uint32(head[8:]))
	_, err = io.ReadFull(f.conn, b)
	return b, got, err
}

// AwaitConfigChange waits until the back end says that the configuration has
// changed.
func (f *Frontend) AwaitConfigChange() error {
	if err := f.back.SetReadDeadline(time.Now().Add(f.opts.Timeout)); err != nil {
		return err
	}
	var b [12]byte
	if _, err := io.ReadFull(f.back, b[:]); err != nil {
		return err
	}
	if ne.Uint32(b[:]) != 2 || ne.Uint32(b[4:]) != 1 || ne.Uint32(b[8:]) != 0 {
		return fmt.Errorf("the back end sends %x", b)
	}
	return nil
}

// AwaitEnd waits until the back end has closed the connection.
func (f *Frontend) AwaitEnd() error {
	if err := f.conn.SetReadDeadline(time.Now().Add(f.opts.Timeout)); err != nil {
		return err
	}
	b := make([]byte, 256)
	for {
		if _, err := f.conn.Read(b); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return err
			}
			return nil
		}
	}
}

// Disconnect ends the connection; Connect and Start make another one, with which
// the queues go on.
func (f *Frontend) Disconnect() {
	if f.conn != nil {
		f.conn.Close()
		f.conn = nil
	}
	if f.back != nil {
		f.back.Close()
		f.back = nil
	}
}

// Close gives all back. Queues must not be in use.
func (f *Frontend) Close() {
	f.Disconnect()
	for _, q := range f.Queues {
		q.close()
	}
	if f.inflight != nil {
		f.inflight.Close()
	}
	if f.Mem != nil {
		_ = unix.Munmap(f.Mem)
		f.Mem = nil
	}
	if f.MemFile != nil {
		f.MemFile.Close()
	}
}

// Inflight maps the memory in which the back end notes requests in work. The
// caller unmaps it.
func (f *Frontend) Inflight() ([]byte, error) {
	return unix.Mmap(int(f.inflight.Fd()), 0, int(ne.Uint64(f.area)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}
