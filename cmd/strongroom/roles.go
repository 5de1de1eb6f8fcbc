package main

import (
	"context"
	"time"

	"strongroom/internal/block/luks"
	"strongroom/internal/block/volume"
	"strongroom/internal/crypto/keymem"
	"strongroom/internal/crypto/xts/xtsbench"
	"strongroom/internal/face/cli"
	"strongroom/internal/role/localvolume"
)

// newRoles tells the command line what runs in this process.
func newRoles() cli.Roles {
	return cli.Roles{
		RunController: runController,
		RunHost:       runHost,
		RunDev:        runDev,
		RunKMS:        runKMS,
		RunKMSDev:     runKMSDev,
		JoinKMS:       joinKMS,
		JoinHost:      joinHost,

		MakeKMSBackupKey: makeKMSBackupKey, KMSBackupRecipient: kmsBackupRecipient,
		VerifyKMSBackup: verifyKMSBackup, DrillKMSBackup: drillKMSBackup, RestoreKMS: restoreKMS,

		FormatVolume:  formatVolume,
		InspectVolume: inspectVolume,
		ServeVolume:   serveVolume,
		EncryptVolume: encryptVolume,
		RekeyVolume:   rekeyVolume,
		DecryptVolume: decryptVolume,
		FillVolume:    fillVolume,
		AdoptVolume:   adoptVolume,
		VerifyAudit:   verifyAudit,
		Benchmark:     benchmark,
	}
}

func formatVolume(_ context.Context, v cli.VolumeFormat) (cli.VolumeInfo, error) {
	info, err := localvolume.Format(localvolume.FormatOptions(v))
	if err != nil {
		return cli.VolumeInfo{}, err
	}
	return volumeInfo(v.File, info), nil
}

func inspectVolume(_ context.Context, v cli.VolumeStorage) (cli.VolumeInfo, error) {
	info, err := localvolume.Inspect(localvolume.Storage(v))
	if err != nil {
		return cli.VolumeInfo{}, err
	}
	return detachedInfo(v, info), nil
}

func detachedInfo(s cli.VolumeStorage, info volume.Info) cli.VolumeInfo {
	v := volumeInfo(s.File, info)
	v.Header = s.Header
	return v
}

func volumeInfo(file string, info volume.Info) cli.VolumeInfo {
	v := cli.VolumeInfo{
		File:          file,
		Format:        "LUKS2",
		UUID:          info.UUID,
		Label:         info.Label,
		Cipher:        luks.Cipher,
		SizeBytes:     info.Size,
		SectorSize:    info.SectorSize,
		DataOffset:    info.DataOffset,
		AllowDiscards: info.AllowDiscards,
		Thin:          info.Thin,
		KeySafes:      []cli.VolumeSafe{},
		Damage:        []string{},
	}
	if r := info.Rekey; r != nil {
		v.Rekey = &cli.VolumeProgress{DoneBytes: r.Done, TotalBytes: r.Total}
	}
	if e := info.Encryption; e != nil {
		v.Encryption = &cli.VolumeProgress{DoneBytes: e.Done, TotalBytes: e.Total}
	}
	for _, s := range info.Safes {
		v.KeySafes = append(v.KeySafes, cli.VolumeSafe{Provider: s.KEK.Provider, KeyID: s.KEK.KeyID, Generation: s.Generation})
	}
	for _, d := range info.Damage {
		v.Damage = append(v.Damage, d.String())
	}
	return v
}

func serveVolume(ctx context.Context, v cli.VolumeServe, ready func(address string)) error {
	return localvolume.Serve(ctx, localvolume.ServeOptions{
		Storage: localvolume.Storage(v.VolumeStorage), KeyFile: v.KeyFile, Socket: v.Socket, TCP: localvolume.TCP(v.TCP), VhostUser: v.VhostUser, Mount: v.Mount,
		ReadOnly: v.ReadOnly, Direct: v.Direct, Ready: ready,
	})
}

func encryptVolume(ctx context.Context, v cli.VolumeEncrypt, progress func(done, total int64)) (cli.VolumeInfo, error) {
	info, err := localvolume.EncryptInPlace(ctx, localvolume.EncryptOptions{
		Storage: localvolume.Storage(v.VolumeStorage), KeyFile: v.KeyFile, Rate: v.Rate, Progress: progress,
	})
	if err != nil {
		return cli.VolumeInfo{}, err
	}
	return detachedInfo(v.VolumeStorage, info), nil
}

func rekeyVolume(ctx context.Context, v cli.VolumeRekey, progress func(done, total int64)) error {
	return localvolume.Rekey(ctx, localvolume.RekeyOptions{
		Storage: localvolume.Storage(v.VolumeStorage), KeyFile: v.KeyFile, NewKeyFile: v.NewKeyFile, InPlace: v.InPlace, Rate: v.Rate, Progress: progress,
	})
}

func decryptVolume(ctx context.Context, v cli.VolumeDecrypt, progress func(done, total int64)) error {
	return localvolume.Decrypt(ctx, localvolume.DecryptOptions{Storage: localvolume.Storage(v.VolumeStorage), KeyFile: v.KeyFile, Out: v.Out, Progress: progress})
}

func fillVolume(ctx context.Context, v cli.VolumeFill, progress func(done, total int64)) error {
	return localvolume.Fill(ctx, localvolume.FillOptions{Storage: localvolume.Storage(v.VolumeStorage), KeyFile: v.KeyFile, Progress: progress})
}

func adoptVolume(ctx context.Context, v cli.VolumeAdopt, passphrase []byte, progress func(done, total int64)) (cli.VolumeInfo, error) {
	secret, err := keymem.Take(passphrase)
	if err != nil {
		return cli.VolumeInfo{}, err
	}
	defer secret.Close()
	info, err := localvolume.Adopt(ctx, localvolume.AdoptOptions{Storage: localvolume.Storage(v.VolumeStorage), Out: v.Out, KeyFile: v.KeyFile, Passphrase: secret, Progress: progress})
	if err != nil {
		return cli.VolumeInfo{}, err
	}
	return volumeInfo(v.Out, info), nil
}

func benchmark(ctx context.Context, each time.Duration) ([]cli.Measurement, error) {
	results, err := xtsbench.Run(ctx, xtsbench.Options{Duration: each})
	if err != nil {
		return nil, err
	}
	all := make([]cli.Measurement, len(results))
	for i, r := range results {
		all[i] = cli.Measurement(r)
	}
	return all, nil
}
