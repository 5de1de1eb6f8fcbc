package rule_test

import (
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"strongroom/api/rule"
)

// TestEveryMethodDeclares walks all services of the contract, also those of files
// that are yet to be written.
func TestEveryMethodDeclares(t *testing.T) {
	t.Parallel()
	services, methods := map[string]bool{}, 0
	protoregistry.GlobalFiles.RangeFilesByPackage("strongroom.v1", func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			name := file.Services().Get(i).FullName()
			rules, err := rule.Of(string(name))
			if err != nil {
				t.Error(err)
			}
			services[string(name.Name())] = true
			methods += len(rules)
		}
		return true
	})
	for _, name := range []string{"VMService", "AgentService", "KMSService", "KMSRootService", "KMSClusterService", "KMSMemberService"} {
		if !services[name] {
			t.Errorf("%s was not looked at", name)
		}
	}
	if methods < 100 {
		t.Errorf("only %d methods were looked at", methods)
	}
}

func TestOf(t *testing.T) {
	t.Parallel()
	rules, err := rule.Of("strongroom.v1.VMService", "strongroom.v1.EnrollService")
	if err != nil {
		t.Fatal(err)
	}
	if got := rules["/strongroom.v1.VMService/RekeyVM"]; got != (rule.Rule{Privilege: "Cryptographer.Recrypt"}) {
		t.Errorf("RekeyVM: %+v", got)
	}
	if got := rules["/strongroom.v1.EnrollService/Heartbeat"]; got != (rule.Rule{PeerRole: "host"}) {
		t.Errorf("Heartbeat: %+v", got)
	}
	if _, err := rule.Of("strongroom.v1.NoService"); err == nil {
		t.Error("an unknown service has rules")
	}
	if _, err := rule.Of("strongroom.v1.VM"); err == nil {
		t.Error("a message has rules")
	}
}
