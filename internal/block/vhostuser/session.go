package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// session is a connection with a front end. One goroutine reads its messages
// and does what they say; it owns all fields but those that say otherwise.
//
// A message that changes what queues work with first stops them. When it is
// done, those that have all they need run again.
type session struct {
	config *Config
	conn   *net.UnixConn

	features  uint64
	protocol  uint64
	memory    guestMemory
	inflight  *inflight // nil: none
	queues    []*queue
	writeback bool
	capacity  uint64 // in sectors, as the front end was last told
	knows     bool   // it was told

	failure atomic.Bool // a request has failed

	back   sync.Mutex // guards backFD
	backFD int        // socket for requests to the front end, or -1
}

func newSession(c *Config, conn *net.UnixConn) *session {
	s := &session{config: c, conn: conn, writeback: true, backFD: -1}
	for i := range c.Queues {
		s.queues = append(s.queues, newQueue(s, i))
	}
	return s
}

func (s *session) log(level slog.Level, msg string, attrs ...slog.Attr) {
	attrs = append([]slog.Attr{slog.String("disk", s.config.Name)}, attrs...)
	s.config.Log.LogAttrs(context.Background(), level, msg, attrs...)
}

// serve reads messages until the front end goes, which is no error.
func (s *session) serve() (err error) {
	defer s.close()
	// In-flight memory may go away like the guest's.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if v := recover(); v != nil {
			fault, ok := v.(interface {
				runtime.Error
				Addr() uintptr
			})
			if !ok {
				panic(v)
			}
			err = fmt.Errorf("shared memory is not there any more: %w", fault)
		}
	}()
	var m message
	for {
		if err := m.receive(s.conn); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return fmt.Errorf("cannot receive from the vhost-user front end: %w", err)
		}
		if err := s.handle(&m); err != nil {
			return err
		}
	}
}

// close stops all and gives all back.
func (s *session) close() {
	for _, q := range s.queues {
		q.close()
	}
	s.memory.clear()
	if s.inflight != nil {
		s.inflight.unmap()
		s.inflight = nil
	}
	s.setBack(-1)
}

// message is what a front end has sent.
type message struct {
	header
	payload []byte
	fds     []int // not yet taken; closed when the message is done

	space [maxPayload]byte
}

// receive reads the next message. It returns io.EOF at the end of the connection.
func (m *message) receive(conn *net.UnixConn) error {
	var head [sizeHeader]byte
	var oob [256]byte // more than CmsgSpace(4*maxFDs)
	m.fds = m.fds[:0]
	// Descriptors come with the first byte.
	n, oobn, flags, _, err := conn.ReadMsgUnix(head[:], oob[:])
	if fdErr := m.parseFDs(oob[:oobn]); err == nil {
		err = fdErr
	}
	if err == nil && flags&unix.MSG_CTRUNC != 0 {
		err = badMessage("more than %d descriptors", maxFDs)
	}
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err == nil {
		_, err = io.ReadFull(conn, head[n:])
	}
	if err == nil {
		m.header, err = parseHeader(head[:])
	}
	if err == nil {
		m.payload = m.space[:m.size]
		_, err = io.ReadFull(conn, m.payload)
	}
	if err != nil {
		m.closeFDs()
	}
	return err
}

func (m *message) parseFDs(oob []byte) error {
	if len(oob) == 0 {
		return nil
	}
	parts, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return err
	}
	for i := range parts {
		fds, err := unix.ParseUnixRights(&parts[i])
		if err != nil {
			continue // not descriptors
		}
		m.fds = append(m.fds, fds...)
	}
	if len(m.fds) > maxFDs {
		return badMessage("%d descriptors", len(m.fds))
	}
	return nil
}

func (m *message) closeFDs() {
	for _, fd := range m.fds {
		unix.Close(fd)
	}
	m.fds = m.fds[:0]
}

// takeFD returns the only descriptor of a message, which then is the caller's.
func (m *message) takeFD() (int, error) {
	if len(m.fds) != 1 {
		return -1, badMessage("request %d with %d descriptors", m.request, len(m.fds))
	}
	fd := m.fds[0]
	m.fds = m.fds[:0]
	return fd, nil
}

// handle does what a message says. An error ends the session.
func (s *session) handle(m *message) error {
	defer m.closeFDs()
	replied, err := s.dispatch(m)
	if err == nil {
		s.startReady()
	}
	if !replied && m.flags&flagNeedReply != 0 && s.protocol&protoReplyAck != 0 {
		ack := uint64(0)
		if err != nil {
			ack = 1
		}
		err = errors.Join(err, s.replyU64(m, ack))
	}
	if err != nil {
		return fmt.Errorf("cannot do request %d of the vhost-user front end: %w", m.request, err)
	}
	return nil
}

func (s *session) startReady() {
	for _, q := range s.queues {
		if !q.running && q.ready() {
			q.start()
		}
	}
}

// share returns how many workers a queue may have. How many queues a front end
// uses it says only by the in-flight memory that it asks for.
func (s *session) share() int {
	queues := len(s.queues)
	if s.inflight != nil {
		queues = s.inflight.queues
	}
	return max(2, s.config.Workers/queues)
}

func (s *session) stopAll() {
	for _, q := range s.queues {
		q.stop()
	}
}

// reply answers a message, with a descriptor if fd is not negative.
func (s *session) reply(m *message, payload []byte, fd int) error {
	var space [sizeHeader + maxPayload]byte
	b := header{m.request, flagVersion | flagReply, uint32(len(payload))}.append(space[:0])
	b = append(b, payload...)
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	if _, _, err := s.conn.WriteMsgUnix(b, oob, nil); err != nil {
		return fmt.Errorf("cannot reply to the vhost-user front end: %w", err)
	}
	return nil
}

func (s *session) replyU64(m *message, v uint64) error {
	return s.reply(m, ne.AppendUint64(nil, v), -1)
}

// setBack replaces the socket for requests to the front end.
func (s *session) setBack(fd int) {
	s.back.Lock()
	defer s.back.Unlock()
	if s.backFD >= 0 {
		unix.Close(s.backFD)
	}
	s.backFD = fd
}

// configChanged tells the front end to read the configuration space again. It is
// called from any goroutine, and never waits.
func (s *session) configChanged() {
	s.back.Lock()
	defer s.back.Unlock()
	if s.backFD < 0 {
		return
	}
	b := header{backendConfigChange, flagVersion, 0}.append(nil)
	if err := unix.Send(s.backFD, b, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL); err != nil {
		s.log(slog.LevelWarn, "cannot tell the front end of a disk's new size", slog.Any("err", err))
	}
}

// eventFile makes a file of a descriptor on which kicks come: one that the
// runtime can poll.
func eventFile(fd int) (*os.File, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "kick")
	if err := f.SetReadDeadline(noDeadline); err != nil {
		f.Close()
		return nil, badMessage("kicks on a descriptor that cannot be polled")
	}
	return f, nil
}
