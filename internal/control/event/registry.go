package event

import (
	"strings"
)

// Severity of an event or alarm.
type Severity string

// The severities.
const (
	Info    Severity = "info"
	Warning Severity = "warning"
	Error   Severity = "error"
)

// Type is a sort of event: the registry has every sort there is.
type Type struct {
	// ID is vSphere's where it has one, with our prefix in place of
	// "com.vmware.vc".
	ID       string
	Severity Severity
	// Text is the message; {name} stands for the argument of that name, {target}
	// and {principal} for those of the event.
	Text string
}

// The ids of the types of events.
const (
	SystemStarted = "strongroom.system.Started"
	TaskFailed    = "strongroom.task.Failed"

	ClusterCreated    = "strongroom.cluster.Created"
	DatastoreCreated  = "strongroom.datastore.Created"
	HostJoined        = "strongroom.host.Joined"
	HostRemoved       = "strongroom.host.Removed"
	HostConnected     = "strongroom.host.Connected"
	HostNotResponding = "strongroom.host.NotResponding"
	HostCryptoEnabled = "strongroom.host.Crypto.Enabled"

	ProviderCreated        = "strongroom.kms.Created"
	ProviderExported       = "strongroom.kms.Exported"
	ProviderBackedUp       = "strongroom.kms.BackedUp"
	ProviderImported       = "strongroom.kms.Imported"
	ProviderDeleted        = "strongroom.kms.Deleted"
	ProviderDefaultChanged = "strongroom.kms.DefaultChanged"
	ProviderStateChanged   = "strongroom.kms.StateChanged"
	ProviderNotBackedUp    = "strongroom.kms.crypto.NotBackedUp"
	ProviderAllBackedUp    = "strongroom.kms.crypto.AllBackedUp"
	ProviderNotOnAllHosts  = "strongroom.kms.crypto.NotOnAllHosts"
	ProviderOnAllHosts     = "strongroom.kms.crypto.OnAllHosts"
	ProviderMissing        = "strongroom.kms.crypto.ProviderMissing"
	ProviderFound          = "strongroom.kms.crypto.ProviderFound"
	NoDefaultProvider      = "strongroom.kms.crypto.NoDefaultProvider"
	DefaultProviderSet     = "strongroom.kms.crypto.DefaultProviderSet"
	ProviderNotEstablished = "strongroom.kms.crypto.NotEstablished"
	ProviderEstablished    = "strongroom.kms.crypto.Established"
	ProviderUpdated        = "strongroom.kms.Updated"

	ProviderOrphansDestroyed = "strongroom.kms.OrphansDestroyed"

	WrappingKeyRotated = "strongroom.kms.WrappingKeyRotated"
	WrappingKeyEnded   = "strongroom.kms.WrappingKeyEnded"
	RotationOverdue    = "strongroom.kms.crypto.RotationOverdue"
	RotationUpToDate   = "strongroom.kms.crypto.RotationUpToDate"

	KeyServerFailed    = "strongroom.kms.crypto.Failure"
	KeyServerRecovered = "strongroom.kms.crypto.Recovered"
	ServerCertEnding   = "strongroom.kms.crypto.ServerCertWarning"
	ServerCertWell     = "strongroom.kms.crypto.ServerCertOK"
	ClientCertEnding   = "strongroom.kms.crypto.ClientCertWarning"
	ClientCertWell     = "strongroom.kms.crypto.ClientCertOK"

	CryptoOperation = "strongroom.crypto.Operation"
	VMCreated       = "strongroom.vm.Created"
	VMLUKSAdopted   = "strongroom.vm.crypto.LUKSAdopted"
	VMCloned        = "strongroom.vm.Cloned"
	VMRegistered    = "strongroom.vm.Registered"
	VMUnregistered  = "strongroom.vm.Unregistered"
	VMForgotten     = "strongroom.vm.Forgotten"
	VMDeleted       = "strongroom.vm.Deleted"
	VMPoweredOn     = "strongroom.vm.PoweredOn"
	VMPoweredOff    = "strongroom.vm.PoweredOff"
	VMEncrypted     = "strongroom.vm.crypto.Encrypted"
	VMDecrypted     = "strongroom.vm.crypto.Decrypted"
	VMRekeyed       = "strongroom.vm.crypto.Rekeyed"
	VMRekeyFailed   = "strongroom.vm.crypto.RekeyFail"
	VMNoDiskSpace   = "strongroom.vm.crypto.NoDiskSpace"
	VMDisksFilled   = "strongroom.vm.crypto.DisksFilled"
	VMDiskResized   = "strongroom.vm.DiskResized"

	VMSnapshotCreated  = "strongroom.vm.SnapshotCreated"
	VMSnapshotReverted = "strongroom.vm.SnapshotReverted"
	VMSnapshotDeleted  = "strongroom.vm.SnapshotDeleted"
	VMSnapshotRenamed  = "strongroom.vm.SnapshotRenamed"
	VMConsolidated     = "strongroom.vm.Consolidated"

	VMMarked        = "strongroom.vm.Marked"
	VMCircular      = "strongroom.vm.crypto.CircularDependency"
	VMCircularEnded = "strongroom.vm.crypto.CircularDependencyEnded"

	DiskKeyExported = "strongroom.vm.crypto.DiskKeyExported"
	VMLocked        = "strongroom.vm.Crypto.VMLocked.KeyMissingOnHost"
	VMUnlocked      = "strongroom.vm.Crypto.VMUnlocked"

	UserCreated         = "strongroom.user.Created"
	UserDeleted         = "strongroom.user.Deleted"
	UserDisabled        = "strongroom.user.Disabled"
	UserEnabled         = "strongroom.user.Enabled"
	UserRolesGranted    = "strongroom.user.RolesGranted"
	UserRolesRevoked    = "strongroom.user.RolesRevoked"
	UserLoggedIn        = "strongroom.user.LoggedIn"
	UserLoginFailed     = "strongroom.user.LoginFailed"
	UserPasswordChanged = "strongroom.user.PasswordChanged"
)

// Types returns every type of event.
func Types() []Type {
	return []Type{
		{SystemStarted, Info, "Controller {version} started"},
		{TaskFailed, Error, "{kind} of {target} failed: {error}"},

		{ClusterCreated, Info, "{principal} created {target}"},
		{DatastoreCreated, Info, "{principal} created {target}"},
		{HostJoined, Info, "{target} joined cluster {cluster}"},
		{HostRemoved, Info, "{principal} removed {target}"},
		{HostConnected, Info, "{target} is connected"},
		{HostNotResponding, Error, "{target} does not answer"},
		{HostCryptoEnabled, Info, "{target} is ready for encryption"},

		{ProviderCreated, Info, "{principal} created {target} (key id {key_id})"},
		{ProviderExported, Warning, "{principal} exported a backup of {target}"},
		{ProviderBackedUp, Info, "{principal} confirmed the backup of {target}"},
		{ProviderImported, Info, "{principal} imported {target} (key id {key_id})"},
		{ProviderDeleted, Warning, "{principal} deleted {target} (key id {key_id}); keep its backups, copies of VMs elsewhere may need them"},
		{ProviderDefaultChanged, Info, "{principal} made the default key provider: {provider}"},
		{ProviderStateChanged, Info, "{target} went from {from} to {to}"},
		{ProviderNotBackedUp, Warning, "{target} is not backed up"},
		{ProviderAllBackedUp, Info, "{target} is backed up"},
		{ProviderNotOnAllHosts, Warning, "{target} is not on all hosts: {details}"},
		{ProviderOnAllHosts, Info, "{target} is on all hosts"},
		{ProviderNotEstablished, Warning, "{target} is not established: {details}"},
		{ProviderEstablished, Info, "{target} was seen to give a key, or is no provider any more"},
		{ProviderUpdated, Info, "{principal} changed {target}"},
		{ProviderOrphansDestroyed, Warning, "{principal} had {keys} keys of {target} destroyed that nothing known here needed"},
		{WrappingKeyRotated, Info, "{target} has the new wrapping key {key_id}; VMs that follow: {vms}"},
		{WrappingKeyEnded, Info, "Nothing here needs the replaced wrapping key {key_id} of {target}: its use was ended at the key server"},
		{RotationOverdue, Warning, "{target} has not got the new wrapping key that it is to have: {details}"},
		{RotationUpToDate, Info, "{target} has the wrapping key that it is to have"},
		{KeyServerFailed, Error, "{target} cannot be used: {details}"},
		{KeyServerRecovered, Info, "{target} can be used, or is no key server of the provider any more"},
		{ServerCertEnding, Warning, "The certificate of key server {server} of {target} {details}"},
		{ServerCertWell, Info, "{target} has a certificate that is valid for long enough"},
		{ClientCertEnding, Warning, "The controller's client certificate for {target} {details}"},
		{ClientCertWell, Info, "{target} knows the controller by a certificate that is valid for long enough"},
		{ProviderMissing, Error, "{target} is not here, but is needed by {vms}"},
		{ProviderFound, Info, "{target} is here, or not needed any more"},
		{NoDefaultProvider, Warning, "There is no default key provider"},
		{DefaultProviderSet, Info, "There is a default key provider"},

		{CryptoOperation, Info, "{principal}: {operation} of {target} with key {key_id} of {provider}"},
		{VMCreated, Info, "{principal} created {target}"},
		{VMLUKSAdopted, Warning, "Disks of {target} have the volume keys of LUKS images; whoever opened those reads every copy of the disks, until: strongroom vm rekey {vm} --deep"},
		{VMCloned, Info, "{principal} made {target} as a clone of vm/{source}"},
		{VMRegistered, Info, "{principal} registered {target}"},
		{VMUnregistered, Info, "{principal} unregistered {target}"},
		{VMForgotten, Info, "{principal} had {target} forgotten, which was unregistered and whose folder {folder} is gone: its keys are orphans"},
		{VMDeleted, Info, "{principal} deleted {target}"},
		{VMPoweredOn, Info, "{target} was powered on on {host}"},
		{VMPoweredOff, Info, "{target} was powered off"},
		{VMEncrypted, Info, "{target} was encrypted with {provider}"},
		{VMDecrypted, Info, "{target} was decrypted"},
		{VMRekeyed, Info, "{target} was rekeyed ({depth}) to {provider}"},
		{VMRekeyFailed, Error, "{target} could not be rekeyed: {error}"},
		{VMNoDiskSpace, Error, "{target}: no room on datastore {datastore} to write its disks"},
		{VMDisksFilled, Info, "Thin disks of {target} were filled: dm-crypt may open them"},
		{VMSnapshotCreated, Info, "{principal} made snapshot {snapshot} of {target}"},
		{VMSnapshotReverted, Warning, "{principal} reverted {target} to snapshot {snapshot}"},
		{VMSnapshotDeleted, Info, "{principal} deleted snapshot {snapshot} of {target}"},
		{VMSnapshotRenamed, Info, "{principal} renamed or described snapshot {snapshot} of {target}, now {name}"},
		{VMConsolidated, Info, "{principal} had files of {target} deleted that none of its snapshots has"},
		{VMDiskResized, Info, "A disk of {target} was made larger"},
		{DiskKeyExported, Warning, "{principal} exported the key of {disk} of {target}; whoever has it reads every copy of the disk"},
		{VMMarked, Info, "{principal} noted what of this site {target} runs: {parts}"},
		{VMCircular, Warning, "{target} cannot be started after its host was: it needs {circle}"},
		{VMCircularEnded, Info, "{target} does not wait for itself any more"},
		{VMLocked, Error, "{target} is locked: {reason}"},
		{VMUnlocked, Info, "{target} is unlocked"},

		{UserCreated, Info, "{principal} created {target}"},
		{UserDeleted, Info, "{principal} deleted {target}"},
		{UserDisabled, Info, "{principal} disabled {target}"},
		{UserEnabled, Info, "{principal} enabled {target}"},
		{UserRolesGranted, Info, "{principal} gave {target} {roles} on {object}"},
		{UserRolesRevoked, Info, "{principal} took {roles} on {object} from {target}"},
		{UserLoggedIn, Info, "{principal} logged in from {address}"},
		{UserLoginFailed, Warning, "Somebody failed to log in as {target} from {address}"},
		{UserPasswordChanged, Info, "{principal} changed the password of {target}"},
	}
}

// AlarmType is a sort of alarm: a condition that should not be, and what says so.
type AlarmType struct {
	// ID is the short name, also that of the runbook's file.
	ID string
	// Name is shown to people, and to health checks: what should be.
	Name  string
	Check string
	// Raised and Cleared are the types of the events that tell of the change.
	Raised, Cleared string
	// Hint is the next command; {name} as in [Type.Text].
	Hint string
	// RepeatHours: tell again as long as the condition lasts; 0 means once.
	RepeatHours int
}

// Runbook is the path of the alarm's runbook below docs.
func (a AlarmType) Runbook() string { return "runbooks/" + a.ID + ".md" }

// The ids of the alarms.
const (
	AlarmProviderNotBackedUp = "provider-not-backed-up"
	AlarmNoDefaultProvider   = "no-default-provider"
	AlarmProviderNotOnHosts  = "provider-not-on-all-hosts"
	AlarmProviderMissing     = "provider-missing"
	AlarmVMLocked            = "vm-locked"
	AlarmCircular            = "circular-dependency"
	AlarmHostNotResponding   = "host-not-responding"

	AlarmProviderNotEstablished = "provider-not-established"
	AlarmKeyServer              = "key-server-failure"
	AlarmServerCertificate      = "key-server-certificate"
	AlarmClientCertificate      = "key-client-certificate"
	AlarmRotationOverdue        = "key-rotation-overdue"
)

// AlarmTypes returns every sort of alarm.
func AlarmTypes() []AlarmType {
	return []AlarmType{
		{
			ID: AlarmProviderNotBackedUp, Name: "Key Provider Backup", Check: "All key providers are backed up",
			Raised: ProviderNotBackedUp, Cleared: ProviderAllBackedUp,
			Hint: "strongroom provider backup {provider} --out {provider}.p12", RepeatHours: 24,
		},
		{
			ID: AlarmNoDefaultProvider, Name: "Default Key Provider", Check: "There is a default key provider",
			Raised: NoDefaultProvider, Cleared: DefaultProviderSet,
			Hint: "strongroom provider default NAME",
		},
		{
			ID: AlarmProviderNotOnHosts, Name: "Key Provider On All Hosts", Check: "All hosts have the keys of all key providers",
			Raised: ProviderNotOnAllHosts, Cleared: ProviderOnAllHosts,
			Hint: "strongroom provider show {provider}",
		},
		{
			ID: AlarmProviderMissing, Name: "Key Provider Missing", Check: "All key providers that VMs need are here",
			Raised: ProviderMissing, Cleared: ProviderFound,
			Hint: "strongroom provider import F.p12",
		},
		{
			ID: AlarmProviderNotEstablished, Name: "Key Provider Establishment", Check: "All standard key providers were seen to give a key",
			Raised: ProviderNotEstablished, Cleared: ProviderEstablished,
			Hint: "strongroom provider check {provider}",
		},
		{
			ID: AlarmKeyServer, Name: "Key Management Server Health Status", Check: "All key servers can be used",
			Raised: KeyServerFailed, Cleared: KeyServerRecovered,
			Hint: "strongroom provider show {provider}",
		},
		{
			ID: AlarmServerCertificate, Name: "KMS Server Certificate Status", Check: "The key servers' certificates are valid for long enough",
			Raised: ServerCertEnding, Cleared: ServerCertWell,
			Hint: "strongroom provider trust {provider}", RepeatHours: 24,
		},
		{
			ID: AlarmClientCertificate, Name: "KMS Client Certificate Status", Check: "The controller's certificates for key servers are valid for long enough",
			Raised: ClientCertEnding, Cleared: ClientCertWell,
			Hint: "strongroom provider set-client {provider}", RepeatHours: 24,
		},
		{
			ID: AlarmRotationOverdue, Name: "Wrapping Key Rotation", Check: "The wrapping keys of all key providers are replaced in time",
			Raised: RotationOverdue, Cleared: RotationUpToDate,
			Hint: "strongroom provider show {provider}", RepeatHours: 24,
		},
		{
			ID: AlarmVMLocked, Name: "Virtual Machine Locked", Check: "All VMs are unlocked",
			Raised: VMLocked, Cleared: VMUnlocked,
			Hint: "strongroom vm unlock {vm}",
		},
		{
			ID: AlarmCircular, Name: "Circular Dependency", Check: "No VM needs itself to be started",
			Raised: VMCircular, Cleared: VMCircularEnded,
			Hint: "strongroom vm decrypt {vm}", RepeatHours: 24,
		},
		{
			ID: AlarmHostNotResponding, Name: "Host Connection", Check: "All hosts answer",
			Raised: HostNotResponding, Cleared: HostConnected,
			Hint: "strongroom host show {host}",
		},
	}
}

// Placeholders returns the names in braces in a text, in order.
func Placeholders(text string) []string {
	var names []string
	for {
		_, rest, ok := strings.Cut(text, "{")
		if !ok {
			return names
		}
		name, after, ok := strings.Cut(rest, "}")
		if !ok {
			return names
		}
		names = append(names, name)
		text = after
	}
}

// fill puts args in place of the names in braces. A name without argument
// stays as it is: an event with a hole tells more than none.
func fill(text string, args map[string]string) string {
	pairs := make([]string, 0, 2*len(args))
	for name, v := range args {
		pairs = append(pairs, "{"+name+"}", v)
	}
	return strings.NewReplacer(pairs...).Replace(text)
}
