package qmp

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// message is one line from QEMU: exactly one of a greeting, an event, a result
// and an error.
type message struct {
	greeting bool
	event    *Event
	result   json.RawMessage // of a command that succeeded
	err      *failure        // of a command that failed
	id       uint64          // of the command, if hasID
	hasID    bool            // false for an error that QEMU cannot attribute
}

type failure struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

// parse decodes one line. On error the message is zero. Unknown members are
// allowed: newer QEMUs add them.
func parse(line []byte) (message, error) {
	if len(line) > LineMax {
		return message{}, fmt.Errorf("QMP message of %d bytes is too long", len(line))
	}
	var wire struct {
		QMP       json.RawMessage `json:"QMP"`
		Return    json.RawMessage `json:"return"`
		Error     *failure        `json:"error"`
		Event     string          `json:"event"`
		Data      json.RawMessage `json:"data"`
		Timestamp struct {
			Seconds      int64 `json:"seconds"`
			Microseconds int64 `json:"microseconds"`
		} `json:"timestamp"`
		ID *uint64 `json:"id"`
	}
	if err := json.Unmarshal(line, &wire); err != nil {
		return message{}, fmt.Errorf("cannot decode a QMP message: %w", err)
	}
	var m message
	kinds := 0
	if wire.QMP != nil {
		kinds++
		m.greeting = true
	}
	if wire.Event != "" {
		kinds++
		m.event = &Event{
			Name: wire.Event,
			// QEMU sends -1 where it has no clock.
			Time: time.Unix(wire.Timestamp.Seconds, 0).Add(time.Duration(wire.Timestamp.Microseconds) * time.Microsecond),
			Data: bytes.Clone(wire.Data),
		}
	}
	if wire.Return != nil {
		kinds++
		m.result = bytes.Clone(wire.Return)
	}
	if wire.Error != nil {
		kinds++
		m.err = wire.Error
	}
	if kinds != 1 {
		return message{}, errors.New("QMP message is not one of greeting, event, result and error")
	}
	if wire.ID != nil && (m.result != nil || m.err != nil) {
		m.id, m.hasID = *wire.ID, true
	}
	if m.result != nil && !m.hasID {
		return message{}, errors.New("QMP result belongs to no command")
	}
	return m, nil
}
