package controller

import (
	"crypto/sha256"
	"slices"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/client"
)

// export returns a provider's backup.
func (s *site) export(name, password string) *strongroomv1.ExportProviderResponse {
	s.t.Helper()
	return must[strongroomv1.ExportProviderResponse](s.t)(client.Call(s.t.Context(), s.admin.Provider().ExportProvider,
		&strongroomv1.ExportProviderRequest{Name: name, Password: []byte(password)}))
}

// provider makes a provider, backs it up and returns the backup.
func (s *site) provider(name string) []byte {
	s.t.Helper()
	must[strongroomv1.Provider](s.t)(client.Call(s.t.Context(), s.admin.Provider().CreateNativeProvider, &strongroomv1.CreateNativeProviderRequest{Name: name}))
	backup := s.export(name, "")
	sum := sha256.Sum256(backup.GetP12())
	must[strongroomv1.Provider](s.t)(client.Call(s.t.Context(), s.admin.Provider().ConfirmProviderBackup,
		&strongroomv1.ConfirmProviderBackupRequest{Name: name, ExportId: backup.GetExportId(), Sha256: sum[:]}))
	return slices.Clone(backup.GetP12())
}
