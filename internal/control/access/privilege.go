package access

import (
	"maps"
	"slices"
	"strings"
)

// Privilege is the name of something that one may be allowed to do, as vSphere
// names it where it has it.
type Privilege string

// privileges is the one table of privileges and what each allows.
// docs/reference/privileges.md is made from it.
func privileges() map[Privilege]string {
	return map[Privilege]string{
		"System.Anonymous": "Begin a session.",
		"System.Read":      "See objects of the inventory, tasks, events, alarms and health.",
		"System.View":      "See the names of objects.",

		"Cryptographer.Access":                 "Read an encrypted VM's data directly: console, export, datastore download.",
		"Cryptographer.AddDisk":                "Attach a disk to an encrypted VM.",
		"Cryptographer.Clone":                  "Clone an encrypted VM.",
		"Cryptographer.Decrypt":                "Decrypt a VM or disk.",
		"Cryptographer.Encrypt":                "Encrypt an existing VM or disk.",
		"Cryptographer.EncryptNew":             "Encrypt a VM or disk as it is created.",
		"Cryptographer.ManageEncryptionPolicy": "Create and change encryption policies.",
		"Cryptographer.ManageKeyServers":       "Manage key providers: create, back up, import, set the default, delete.",
		"Cryptographer.ManageKeys":             "Add, remove and list keys.",
		"Cryptographer.Migrate":                "Migrate an encrypted VM.",
		"Cryptographer.ReadKeyServersInfo":     "See key providers, their state and usage.",
		"Cryptographer.Recrypt":                "Rekey a VM or disk, shallow or deep.",
		"Cryptographer.RegisterHost":           "Make a host ready for encryption.",
		"Cryptographer.RegisterVM":             "Register an encrypted VM, or unlock it.",

		"KeyServer.ApproveOperations": "Approve or deny what a quorum of a key management server is asked for.",

		"VirtualMachine.Config.AddNewDisk":            "Add a disk to a VM.",
		"VirtualMachine.Config.DiskExtend":            "Make a VM's disk larger.",
		"VirtualMachine.Config.RemoveDisk":            "Remove a disk from a VM.",
		"VirtualMachine.Config.Settings":              "Change a VM's settings.",
		"VirtualMachine.Interact.ConsoleInteract":     "Use a VM's console.",
		"VirtualMachine.Interact.GuestControl":        "Run programs in a guest.",
		"VirtualMachine.Interact.PowerOff":            "Power a VM off.",
		"VirtualMachine.Interact.PowerOn":             "Power a VM on.",
		"VirtualMachine.Interact.Reset":               "Reset a VM.",
		"VirtualMachine.Interact.Suspend":             "Suspend a VM.",
		"VirtualMachine.Inventory.Create":             "Create a VM.",
		"VirtualMachine.Inventory.CreateFromExisting": "Create a VM from another.",
		"VirtualMachine.Inventory.Delete":             "Delete a VM with its disks.",
		"VirtualMachine.Inventory.Move":               "Move a VM.",
		"VirtualMachine.Inventory.Register":           "Register a VM.",
		"VirtualMachine.Inventory.Unregister":         "Unregister a VM.",
		"VirtualMachine.Provisioning.Clone":           "Clone a VM.",
		"VirtualMachine.State.CreateSnapshot":         "Make a snapshot.",
		"VirtualMachine.State.RemoveSnapshot":         "Remove a snapshot.",
		"VirtualMachine.State.RenameSnapshot":         "Rename or describe a snapshot.",
		"VirtualMachine.State.RevertToSnapshot":       "Go back to a snapshot.",

		"Host.Config.Maintenance":              "Put a host into maintenance.",
		"Host.Inventory.AddHostToCluster":      "Add a host to a cluster.",
		"Host.Inventory.AddStandaloneHost":     "Add a host that is in no cluster.",
		"Host.Inventory.CreateCluster":         "Create a cluster.",
		"Host.Inventory.DeleteCluster":         "Delete a cluster.",
		"Host.Inventory.EditCluster":           "Change a cluster.",
		"Host.Inventory.RemoveHostFromCluster": "Remove a host from its cluster.",
		"Host.Local.ManageUserGroups":          "Manage accounts on a host.",
		"Host.Tpm.Read":                        "Read a host's TPM measurements.",
		"Host.Tpm.Unseal":                      "Unseal secrets with a host's TPM.",

		"Datastore.AllocateSpace":         "Put a VM or disk on a datastore.",
		"Datastore.Browse":                "List what is on a datastore.",
		"Datastore.Config":                "Add and change datastores.",
		"Datastore.Delete":                "Remove a datastore.",
		"Datastore.FileManagement":        "Change files on a datastore.",
		"Vsan.Cluster.ShallowRekey":       "Give an encrypted datastore a new KEK.",
		"Global.CancelTask":               "Cancel a task.",
		"Global.Diagnostics":              "Collect support bundles and logs.",
		"Global.ManageCustomFields":       "Change custom attributes.",
		"Global.Settings":                 "Change settings of the controller.",
		"Task.Create":                     "Create tasks.",
		"Task.Update":                     "Cancel tasks and change their state.",
		"Alarm.Acknowledge":               "Acknowledge alarms.",
		"Audit.Read":                      "Read and verify the audit log.",
		"Authorization.ModifyPermissions": "Give and take permissions.",
		"Authorization.ModifyRoles":       "Create, change and delete roles.",
		"Authorization.ModifyUsers":       "Create and delete users.",
		"Authorization.ReadUsers":         "List users.",
		"Sessions.TerminateSession":       "End sessions and revoke tokens of others.",
	}
}

// Privileges returns all privileges, sorted, and what each allows.
func Privileges() ([]Privilege, map[Privilege]string) {
	m := privileges()
	return slices.Sorted(maps.Keys(m)), m
}

// Known reports whether p is a privilege.
func Known(p Privilege) bool {
	_, ok := privileges()[p]
	return ok
}

// The roles that always exist, some in one kind of role only.
const (
	Administrator = "Administrator"
	NoCryptoAdmin = "NoCryptoAdmin"
	ReadOnly      = "ReadOnly"
	KeyCustodian  = "KeyCustodian" // of a key management server only
	Auditor       = "Auditor"      // likewise
)

// withoutCrypto is what vSphere's "No cryptography administrator" lacks beside
// Cryptographer.*: each is a way around it.
func withoutCrypto() []Privilege {
	return []Privilege{
		"Global.Diagnostics", "Host.Inventory.AddHostToCluster", "Host.Inventory.AddStandaloneHost",
		"Host.Local.ManageUserGroups", "VirtualMachine.Interact.GuestControl", "Host.Tpm.Read", "Host.Tpm.Unseal",
		// Who can hand out roles can hand himself the missing ones.
		"Authorization.ModifyPermissions", "Authorization.ModifyRoles", "Authorization.ModifyUsers",
		"Sessions.TerminateSession", "Vsan.Cluster.ShallowRekey", "KeyServer.ApproveOperations",
	}
}

func administrator() Role {
	all, _ := Privileges()
	return Role{Name: Administrator, Description: "Everything.", BuiltIn: true, Privileges: all}
}

func noCryptoAdmin() Role {
	all, _ := Privileges()
	no := withoutCrypto()
	return Role{
		Name: NoCryptoAdmin, Description: "Everything but cryptography, and what would lead around that.", BuiltIn: true,
		Privileges: slices.DeleteFunc(all, func(p Privilege) bool {
			return strings.HasPrefix(string(p), "Cryptographer.") || slices.Contains(no, p)
		}),
	}
}

func readOnly() Role {
	return Role{
		Name: ReadOnly, Description: "See everything but secrets, change nothing.", BuiltIn: true,
		Privileges: []Privilege{"Cryptographer.ReadKeyServersInfo", "System.Anonymous", "System.Read", "System.View"},
	}
}

// KMSRoles returns the roles that a key management server has beside
// Administrator.
func KMSRoles() []Role {
	return []Role{
		{
			Name: KeyCustodian, Description: "Approve or deny what a group's quorum is asked for; see everything but secrets.", BuiltIn: true,
			Privileges: append([]Privilege{"KeyServer.ApproveOperations"}, readOnly().Privileges...),
		},
		{
			Name: Auditor, Description: "Read and verify the audit log; see everything but secrets.", BuiltIn: true,
			Privileges: append([]Privilege{"Audit.Read"}, readOnly().Privileges...),
		},
		readOnly(),
	}
}
