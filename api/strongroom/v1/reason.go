// Package strongroomv1 is the generated code of the API's messages, and the
// reasons in its errors that one role branches on when another one says them.
package strongroomv1

// ReasonVMBusy is the reason of an InvalidState error of a host that has another
// operation on the VM under way: the same call may succeed later.
const ReasonVMBusy = "VMBusy"

// ReasonRekeyInProgress is the reason of an InvalidState error about a disk of
// which a deep rekey is under way: it has to come to its end first.
const ReasonRekeyInProgress = "RekeyInProgress"

// ReasonHasSnapshots is the reason of an InvalidState error about what a VM with
// snapshots does not allow.
const ReasonHasSnapshots = "VMHasSnapshots"

// ReasonCircularDependency is the reason of an InvalidState error about a VM that
// would need itself to be started.
const ReasonCircularDependency = "CircularDependency"

// ReasonEncryptionInProgress is the reason of an InvalidState error about a disk
// whose encryption in place has begun and is not finished.
const ReasonEncryptionInProgress = "EncryptionInProgress"
