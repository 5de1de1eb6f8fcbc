package rule_test

import (
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"

	"strongroom/api/rule"
	strongroomv1 "strongroom/api/strongroom/v1"
)

// TestEveryMethodDeclares walks all services of the contract.
func TestEveryMethodDeclares(t *testing.T) {
	t.Parallel()
	methods := 0
	for _, file := range []protoreflect.FileDescriptor{
		strongroomv1.File_strongroom_v1_access_proto, strongroomv1.File_strongroom_v1_agent_proto, strongroomv1.File_strongroom_v1_cluster_proto,
		strongroomv1.File_strongroom_v1_event_proto, strongroomv1.File_strongroom_v1_provider_proto, strongroomv1.File_strongroom_v1_session_proto,
		strongroomv1.File_strongroom_v1_task_proto, strongroomv1.File_strongroom_v1_vm_proto,
	} {
		for i := range file.Services().Len() {
			rules, err := rule.Of(string(file.Services().Get(i).FullName()))
			if err != nil {
				t.Error(err)
			}
			methods += len(rules)
		}
	}
	if methods < 50 {
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
