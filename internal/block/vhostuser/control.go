package vhostuser

import (
	"time"

	"golang.org/x/sys/unix"
)

var noDeadline time.Time

// dispatch does what one message says. It reports whether the message has a
// reply of its own, which then was sent.
func (s *session) dispatch(m *message) (replied bool, err error) {
	switch m.request {
	case reqGetFeatures:
		return true, s.replyU64(m, s.config.offered())
	case reqGetProtocolFeatures:
		return true, s.replyU64(m, protoAll)
	case reqGetQueueNum:
		return true, s.replyU64(m, uint64(len(s.queues)))
	case reqGetMaxMemSlots:
		return true, s.replyU64(m, maxRegions)
	case reqGetVringBase:
		return true, s.getVringBase(m)
	case reqGetConfig:
		return true, s.getConfig(m)
	case reqGetInflightFD:
		return true, s.getInflight(m)
	case reqSetOwner:
		return false, nil
	case reqResetOwner:
		s.stopAll()
		for _, q := range s.queues {
			q.enabled = false
		}
		return false, nil
	case reqSetFeatures:
		return false, s.setFeatures(m)
	case reqSetProtocolFeatures:
		return false, s.setProtocolFeatures(m)
	case reqSetMemTable:
		return false, s.setMemTable(m)
	case reqAddMemReg:
		return false, s.addRegion(m)
	case reqRemMemReg:
		return false, s.removeRegion(m)
	case reqSetVringNum, reqSetVringBase, reqSetVringEnable:
		return false, s.setVring(m)
	case reqSetVringAddr:
		return false, s.setVringAddr(m)
	case reqSetVringKick, reqSetVringCall, reqSetVringErr:
		return false, s.setVringFD(m)
	case reqSetBackendReqFD:
		return false, s.setBackendReqFD(m)
	case reqSetConfig:
		return false, s.setConfig(m)
	case reqSetInflightFD:
		return false, s.setInflight(m)
	}
	return false, badMessage("it is unknown")
}

func (s *session) setFeatures(m *message) error {
	v, err := parseU64(m.payload)
	if err != nil {
		return err
	}
	if extra := v &^ s.config.offered(); extra != 0 {
		return badMessage("features %#x that were not offered", extra)
	}
	s.stopAll()
	s.features = v
	if v&featureProtocol == 0 {
		for _, q := range s.queues {
			q.enabled = true
		}
	}
	return nil
}

func (s *session) setProtocolFeatures(m *message) error {
	v, err := parseU64(m.payload)
	if err != nil {
		return err
	}
	if extra := v &^ protoAll; extra != 0 {
		return badMessage("protocol features %#x that were not offered", extra)
	}
	s.protocol = v
	return nil
}

// setMemTable replaces the guest's memory.
func (s *session) setMemTable(m *message) error {
	specs, err := parseMemTable(m.payload)
	if err != nil {
		return err
	}
	if len(specs) != len(m.fds) {
		return badMessage("%d regions of memory with %d descriptors", len(specs), len(m.fds))
	}
	s.stopAll()
	s.memory.clear()
	for i, spec := range specs {
		if err := s.memory.add(spec, m.fds[i]); err != nil {
			s.memory.clear()
			return err
		}
	}
	return nil
}

func (s *session) addRegion(m *message) error {
	spec, err := parseSingleRegion(m.payload)
	if err != nil {
		return err
	}
	if len(m.fds) != 1 {
		return badMessage("a region of memory with %d descriptors", len(m.fds))
	}
	s.stopAll()
	return s.memory.add(spec, m.fds[0])
}

func (s *session) removeRegion(m *message) error {
	spec, err := parseSingleRegion(m.payload)
	if err != nil {
		return err
	}
	s.stopAll()
	return s.memory.remove(spec)
}

func (s *session) queue(index uint32) (*queue, error) {
	if index >= uint32(len(s.queues)) {
		return nil, badMessage("there is no queue %d", index)
	}
	return s.queues[index], nil
}

// setVring sets a number of a queue.
func (s *session) setVring(m *message) error {
	v, err := parseVringState(m.payload)
	if err != nil {
		return err
	}
	q, err := s.queue(v.index)
	if err != nil {
		return err
	}
	switch m.request {
	case reqSetVringNum:
		if v.num == 0 || v.num > maxQueueSize || v.num&(v.num-1) != 0 {
			return badMessage("a queue of %d", v.num)
		}
		q.stop()
		q.size = uint16(v.num)
		q.broken.Store(false)
	case reqSetVringBase:
		if v.num > 0xffff {
			return badMessage("a queue that begins at %d", v.num)
		}
		q.stop()
		q.base = uint16(v.num)
	case reqSetVringEnable:
		if v.num > 1 {
			return badMessage("a queue that is %d enabled", v.num)
		}
		if q.enabled = v.num == 1; !q.enabled {
			q.stop()
		} else {
			s.catchUp()
		}
	}
	return nil
}

func (s *session) setVringAddr(m *message) error {
	v, err := parseVringAddr(m.payload)
	if err != nil {
		return err
	}
	q, err := s.queue(v.index)
	if err != nil {
		return err
	}
	if v.flags != 0 {
		return badMessage("a queue with flags %#x", v.flags)
	}
	q.stop()
	q.addr, q.placed = v, true
	q.broken.Store(false)
	return nil
}

// getVringBase stops a queue and tells where it stands.
func (s *session) getVringBase(m *message) error {
	v, err := parseVringState(m.payload)
	if err != nil {
		return err
	}
	q, err := s.queue(v.index)
	if err != nil {
		return err
	}
	q.stop()
	q.setKick(nil) // until the next one comes, the queue is stopped
	b := ne.AppendUint32(nil, v.index)
	return s.reply(m, ne.AppendUint32(b, uint32(q.base)), -1)
}

// setVringFD sets an eventfd of a queue.
func (s *session) setVringFD(m *message) error {
	v, err := parseU64(m.payload)
	if err != nil {
		return err
	}
	q, err := s.queue(uint32(v & 0xff))
	if err != nil {
		return err
	}
	if v&^(0xff|vringNoFD) != 0 {
		return badMessage("an eventfd for %#x", v)
	}
	fd := -1
	if v&vringNoFD == 0 {
		if fd, err = m.takeFD(); err != nil {
			return err
		}
	}
	if m.request == reqSetVringKick {
		if fd < 0 {
			return badMessage("a queue to be polled, which we do not do")
		}
		f, err := eventFile(fd)
		if err != nil {
			return err
		}
		q.stop()
		q.setKick(f)
		return nil
	}
	if fd >= 0 {
		if err := unix.SetNonblock(fd, true); err != nil {
			unix.Close(fd)
			return err
		}
	}
	if m.request == reqSetVringCall {
		q.setCall(fd)
		return nil
	}
	q.stop()
	q.setErr(fd)
	return nil
}

func (s *session) setBackendReqFD(m *message) error {
	fd, err := m.takeFD()
	if err != nil {
		return err
	}
	s.setBack(fd)
	return nil
}

func (s *session) getConfig(m *message) error {
	access, _, err := parseConfig(m.payload)
	if err != nil {
		return err
	}
	s.capacity, s.knows = s.sectors(), true
	space := s.config.space(s.capacity, s.writeback)
	s.remember()
	b := append([]byte(nil), m.payload[:sizeConfigHead]...)
	return s.reply(m, append(b, space[access.offset:access.offset+access.size]...), -1)
}

func (s *session) sectors() uint64 { return uint64(s.config.Device.Size()) / sectorSize }

// setConfig sets the cache mode, the only field that a driver may write. What a
// migration brings along is taken the same way.
func (s *session) setConfig(m *message) error {
	access, b, err := parseConfig(m.payload)
	if err != nil {
		return err
	}
	if access.flags == 0 && (access.offset != configWriteback || access.size != 1) {
		return badMessage("%d bytes of configuration at %d, which are read-only", access.size, access.offset)
	}
	if at := configWriteback - int(access.offset); at >= 0 && at < len(b) {
		s.stopAll()
		s.writeback = b[at] != 0
		s.remember()
		if !s.writeback && !s.config.ReadOnly {
			// From now on no write is in a cache, also none of before.
			return s.config.Device.Flush()
		}
	}
	return nil
}

// getInflight makes memory for requests in work.
func (s *session) getInflight(m *message) error {
	spec, err := parseInflight(m.payload)
	if err != nil {
		return err
	}
	if int(spec.queues) > len(s.queues) {
		return badMessage("in-flight memory for %d queues", spec.queues)
	}
	f, fd, err := newInflight(int(spec.queues), int(spec.queueSize))
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	s.setInflightMemory(f)
	s.remember()
	spec.size, spec.offset = uint64(len(f.mem)), 0
	// The front end expects the length that it has sent.
	b := spec.append(nil)
	return s.reply(m, append(b, make([]byte, len(m.payload)-len(b))...), fd)
}

// setInflight takes memory that the front end has kept.
func (s *session) setInflight(m *message) error {
	spec, err := parseInflight(m.payload)
	if err != nil {
		return err
	}
	if len(m.fds) != 1 {
		return badMessage("in-flight memory with %d descriptors", len(m.fds))
	}
	if int(spec.queues) > len(s.queues) {
		return badMessage("in-flight memory for %d queues", spec.queues)
	}
	f, err := mapInflight(spec, m.fds[0])
	if err != nil {
		return err
	}
	s.setInflightMemory(f)
	if capacity, writeback, ok := f.recall(); ok {
		s.writeback = writeback
		if !s.knows && capacity != unknown {
			s.capacity, s.knows = capacity, true
		}
	}
	return nil
}

func (s *session) setInflightMemory(f *inflight) {
	s.stopAll()
	if s.inflight != nil {
		s.inflight.unmap()
	}
	s.inflight = f
}

// remember notes for the next back end what the front end will not tell it.
func (s *session) remember() {
	if s.inflight == nil {
		return
	}
	capacity := uint64(unknown)
	if s.knows {
		capacity = s.capacity
	}
	s.inflight.remember(capacity, s.writeback)
}

// catchUp tells a front end of a size that has changed while it was away. It has
// read the configuration space only once, long ago.
func (s *session) catchUp() {
	if s.knows && s.capacity != s.sectors() {
		s.configChanged()
	}
}
