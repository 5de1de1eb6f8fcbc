package keyfile

// SetSyncDir changes what makes names durable until restore is called. No test
// that makes files may run meanwhile.
func SetSyncDir(f func(string) error) (restore func()) {
	before := syncDir
	syncDir = f
	return func() { syncDir = before }
}
