// Package rule reads from the protobuf descriptors who may call which method. A
// server builds its access check from it at start, and does not start if a
// method declares nothing: what was forgotten is denied.
package rule

import (
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	strongroomv1 "strongroom/api/strongroom/v1"
)

// Rule says who may call a method. Exactly one field is set.
type Rule struct {
	Privilege       string // whoever has this privilege
	Authenticated   bool   // whoever is logged in, about itself
	Unauthenticated bool   // anybody: the method checks a credential itself
	PeerRole        string // the holder of that role's certificate: "host", "controller"
	Application     bool   // applications of a KMS, under their group's policy
}

// Rules maps a procedure, such as "/strongroom.v1.VMService/GetVM", to its rule.
type Rules map[string]Rule

// Of returns the rules of all methods of the services, which are named as in
// "strongroom.v1.VMService". It is an error if a service is unknown or a method
// does not declare exactly one option.
func Of(services ...string) (Rules, error) {
	rules := Rules{}
	for _, name := range services {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(name))
		if err != nil {
			return nil, fmt.Errorf("cannot find service %s: %w", name, err)
		}
		service, ok := d.(protoreflect.ServiceDescriptor)
		if !ok {
			return nil, fmt.Errorf("%s is no service", name)
		}
		for i := range service.Methods().Len() {
			method := service.Methods().Get(i)
			r, err := of(method)
			if err != nil {
				return nil, err
			}
			rules[fmt.Sprintf("/%s/%s", name, method.Name())] = r
		}
	}
	return rules, nil
}

func of(method protoreflect.MethodDescriptor) (Rule, error) {
	options, _ := method.Options().(*descriptorpb.MethodOptions)
	r := Rule{
		Privilege:       proto.GetExtension(options, strongroomv1.E_Privilege).(string),
		Authenticated:   proto.GetExtension(options, strongroomv1.E_Authenticated).(bool),
		Unauthenticated: proto.GetExtension(options, strongroomv1.E_Unauthenticated).(bool),
		PeerRole:        proto.GetExtension(options, strongroomv1.E_PeerRole).(string),
		Application:     proto.GetExtension(options, strongroomv1.E_Application).(bool),
	}
	declared := 0
	for _, set := range []bool{r.Privilege != "", r.Authenticated, r.Unauthenticated, r.PeerRole != "", r.Application} {
		if set {
			declared++
		}
	}
	if declared != 1 {
		return Rule{}, fmt.Errorf("method %s declares %d of privilege, authenticated, unauthenticated, peer_role and application: it must declare one", method.FullName(), declared)
	}
	return r, nil
}
