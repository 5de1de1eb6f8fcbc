package store

import "testing"

// TestTokenMakesAnotherDatabase: a member of one is a stranger to the other,
// although both have the address that each single member has.
func TestTokenMakesAnotherDatabase(t *testing.T) {
	t.Parallel()
	identity := func(token string) uint64 {
		d, err := Open(t.Context(), Config{Dir: t.TempDir(), Token: token})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		return uint64(d.etcd.Server.Cluster().ID())
	}
	plain, again, other := identity(""), identity(""), identity("x")
	if plain != again || plain == other {
		t.Errorf("identities %x, %x and, with a token, %x", plain, again, other)
	}
}
