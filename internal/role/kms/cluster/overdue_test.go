package cluster

import (
	"testing"
	"time"
)

// TestOverdue tells of a node with erasures due after a while, again now and
// then, and no more once it has done them.
func TestOverdue(t *testing.T) {
	t.Parallel()
	var o overdue
	began := time.Unix(1_700_000_000, 0)
	for _, c := range []struct {
		after time.Duration
		due   int
		want  bool
	}{
		{0, 3, false},
		{overdueAfter - time.Second, 1, false},
		{overdueAfter, 2, true},
		{overdueAfter + lookEvery, 2, false},
		{overdueAfter + overdueEvery, 2, true},
		{overdueAfter + overdueEvery + time.Minute, 0, false},
		{overdueAfter + overdueEvery + 2*time.Minute, 1, false}, // anew
		{2*overdueAfter + overdueEvery + 2*time.Minute, 1, true},
	} {
		members := []Listed{{Member: Member{ID: "1", Name: "a"}}, {Member: Member{ID: "2", Name: "b"}, ErasuresDue: c.due}}
		late := o.of(members, began.Add(c.after))
		if (len(late) == 1) != c.want || len(late) > 1 || len(late) == 1 && late[0].Name != "b" {
			t.Errorf("after %v with %d due: %v", c.after, c.due, late)
		}
	}
}
