package main

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/access"
)

const apiPackage = "strongroom.v1"

const apiIntro = `# API

Generated from ` + "`api/strongroom/v1/*.proto`" + `, the one contract of users, the command line, controllers and
hosts. It is served with [Connect](https://connectrpc.com): gRPC, and plain JSON over HTTP:

    curl --cacert ca.pem -H "Authorization: Bearer $STRONGROOM_TOKEN" -H "Content-Type: application/json" \
      -d '{"name": "web-1"}' https://controller.example:7443/strongroom.v1.VMService/GetVM

A token comes from ` + "`SessionService.Login` or `strongroom token create`" + `. In JSON, fields are in camelCase
(` + "`power_state` is `powerState`" + `), 64-bit numbers are strings, bytes are base64, and times are RFC 3339.

Every error carries an ` + "`ErrorDetail`" + `: its kind, which is also the exit code of the command line, a reason
where one is defined, and a hint, which is the next command to try.

| Kind | Meaning | Exit code |
|---|---|---|
| Invalid | the request can never succeed as sent | 2 |
| NotFound | the named object does not exist | 3 |
| Exists | the named object exists already | 1 |
| Denied | the caller lacks the privilege, or is not who it must be | 4 |
| Locked | the object's key cannot be had | 5 |
| Unavailable | a dependency is down; the same request may succeed later | 6 |
| Corrupt | stored bytes fail authentication or a checksum | 1 |
| InvalidState | the object's state does not allow it | 1 |
| NoSpace | the storage is full | 1 |
| Canceled | the caller or an operator stopped it | 1 |
| Other | an internal error; the server's log has its incident id | 1 |
`

// apiFiles returns the files of the API, by name.
func apiFiles() []protoreflect.FileDescriptor {
	var files []protoreflect.FileDescriptor
	protoregistry.GlobalFiles.RangeFilesByPackage(apiPackage, func(f protoreflect.FileDescriptor) bool {
		files = append(files, f)
		return true
	})
	slices.SortFunc(files, func(a, b protoreflect.FileDescriptor) int { return strings.Compare(a.Path(), b.Path()) })
	return files
}

func apiPage(c comments) []byte {
	var b strings.Builder
	b.WriteString(apiIntro)
	for _, f := range apiFiles() {
		for s := range each(f.Services()) {
			fmt.Fprintf(&b, "\n## %s\n\n%s\n\n| Method | Needs | |\n|---|---|---|\n", s.Name(), c[string(s.Name())])
			for m := range each(s.Methods()) {
				fmt.Fprintf(&b, "| %s([%s](#%s)) returns %s | %s | %s |\n", m.Name(), m.Input().Name(), anchor(m.Input()), result(m), needs(m), tableText(c[string(s.Name())+"."+string(m.Name())]))
			}
		}
	}
	b.WriteString("\n## Messages\n")
	for _, f := range apiFiles() {
		for m := range each(f.Messages()) {
			messageSection(&b, c, m)
		}
	}
	return []byte(b.String())
}

func messageSection(b *strings.Builder, c comments, m protoreflect.MessageDescriptor) {
	fmt.Fprintf(b, "\n### %s\n\n", m.Name())
	if text := c[string(m.Name())]; text != "" {
		b.WriteString(text + "\n\n")
	}
	if m.Fields().Len() == 0 {
		b.WriteString("It has no fields.\n")
		return
	}
	b.WriteString("| Field | Type | |\n|---|---|---|\n")
	for f := range each(m.Fields()) {
		fmt.Fprintf(b, "| %s | %s | %s |\n", f.Name(), fieldType(f), tableText(c[string(m.Name())+"."+string(f.Name())]))
	}
}

// needs says who may call a method.
func needs(m protoreflect.MethodDescriptor) string {
	o := m.Options()
	switch {
	case proto.GetExtension(o, strongroomv1.E_Unauthenticated).(bool):
		return "nothing"
	case proto.GetExtension(o, strongroomv1.E_Authenticated).(bool):
		return "a session"
	case proto.GetExtension(o, strongroomv1.E_PeerRole).(string) != "":
		return "the certificate of a " + proto.GetExtension(o, strongroomv1.E_PeerRole).(string)
	case proto.GetExtension(o, strongroomv1.E_Application).(bool):
		return "a credential of an application"
	}
	return "[" + privilege(m) + "](privileges.md)"
}

func privilege(m protoreflect.MethodDescriptor) string {
	return proto.GetExtension(m.Options(), strongroomv1.E_Privilege).(string)
}

func result(m protoreflect.MethodDescriptor) string {
	link := fmt.Sprintf("[%s](#%s)", m.Output().Name(), anchor(m.Output()))
	if m.IsStreamingServer() {
		return "a stream of " + link
	}
	return link
}

func fieldType(f protoreflect.FieldDescriptor) string {
	switch {
	case f.IsMap():
		return fmt.Sprintf("map of %s to %s", f.MapKey().Kind(), f.MapValue().Kind())
	case f.IsList():
		return "list of " + elementType(f)
	}
	return elementType(f)
}

func elementType(f protoreflect.FieldDescriptor) string {
	switch {
	case f.Message() == nil:
		return f.Kind().String()
	case f.Message().ParentFile().Package() != apiPackage:
		return string(f.Message().Name())
	}
	return fmt.Sprintf("[%s](#%s)", f.Message().Name(), anchor(f.Message()))
}

func anchor(m protoreflect.MessageDescriptor) string { return strings.ToLower(string(m.Name())) }

func tableText(s string) string { return strings.ReplaceAll(s, "|", `\|`) }

// privilegesPage lists the privileges and the methods that need them.
func privilegesPage() []byte {
	users := make(map[string][]string)
	for _, f := range apiFiles() {
		for s := range each(f.Services()) {
			for m := range each(s.Methods()) {
				if p := privilege(m); p != "" {
					users[p] = append(users[p], string(s.Name())+"."+string(m.Name()))
				}
			}
		}
	}
	var b strings.Builder
	b.WriteString(`# Privileges

Generated from the code. A role is a set of privileges; a user has roles. ` + "`strongroom role ls`" + ` lists the
roles and their privileges, ` + "`strongroom whoami`" + ` your own. The names are vSphere's where it has them; those
without a method yet belong to features that are not there yet.

| Privilege | Allows | Methods of the [API](api.md) |
|---|---|---|
`)
	all, what := access.Privileges()
	for _, p := range all {
		fmt.Fprintf(&b, "| %s | %s | %s |\n", p, tableText(what[p]), strings.Join(users[string(p)], ", "))
	}
	return []byte(b.String())
}

// each iterates over one of protoreflect's lists.
func each[T any](list interface {
	Len() int
	Get(int) T
},
) func(func(T) bool) {
	return func(yield func(T) bool) {
		for i := range list.Len() {
			if !yield(list.Get(i)) {
				return
			}
		}
	}
}
