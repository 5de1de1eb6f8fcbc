package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"strongroom/internal/keys/kmip/kmipserver"
	"strongroom/internal/keys/kmip/kmiptest/conform"
)

// casesCount is how many test cases of OASIS there are for KMIP 1.0 to 1.3.
const casesCount = 273

// kmipPage tells what the KMIP server of `strongroom kms` can do.
func kmipPage() []byte {
	var b strings.Builder
	b.WriteString("# KMIP\n\n" +
		"Generated from the server's tables. `strongroom kms` speaks KMIP 1.0 to 1.4 (OASIS Key Management Interoperability\n" +
		"Protocol Specification) in TTLV over TLS 1.2 and 1.3. Who a client is, its certificate or its user name and password\n" +
		"say; it sees the objects of its application's group only. Of what stands here a group's policy can allow less\n" +
		"(`strongroom kms group policy`). Asynchronous requests are answered at once; the server never calls its clients.\n\n" +
		"## Operations\n\n" +
		"| Operation | Since KMIP |\n|---|---|\n")
	for _, op := range kmipserver.Operations() {
		fmt.Fprintf(&b, "| %s | %s |\n", ttlv.EnumStr(op), number(kmipserver.Since(op)))
	}
	b.WriteString("\n## Objects\n\n")
	var types []string
	for t := kmip.ObjectTypeCertificate; kmipserver.Keeps(t); t++ {
		types = append(types, ttlv.EnumStr(t))
	}
	b.WriteString(strings.Join(types, ", ") + ".\n\n" +
		"## Attributes\n\n" +
		"What a client may do: give it when the object is made, add it later, change it, delete it. Those with nothing are the\n" +
		"server's. Attributes whose names begin with `x-` are the client's: several values, and all may be done. What narrows the\n" +
		"use of an object is not widened again: a Sensitive object stays so, one that is not Extractable too, usage limits that\n" +
		"were begun stay, and dates that have come.\n\n" +
		"| Attribute | Since KMIP | Values | Give | Add | Change | Delete |\n|---|---|---|---|---|---|---|\n")
	for _, a := range kmipserver.Attributes() {
		values := "one"
		if a.Multi {
			values = "several"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s |\n", a.Name, number(a.Since), values, yes(a.Initial), yes(a.Add), yes(a.Modify), yes(a.Delete))
	}
	b.WriteString("\n## Limits\n\n" +
		"Those of connections are `max_connections` and `max_connections_per_address` in [kms.toml](kms.toml).\n\n" +
		"| Of | At most |\n|---|---|\n")
	for _, l := range kmipserver.Bounds() {
		fmt.Fprintf(&b, "| %s | %s |\n", l.Of, l.Value)
	}
	fmt.Fprintf(&b, "\n## Test cases of OASIS\n\n"+
		"Of the %d cases for KMIP 1.0 to 1.3 these %d do not pass, and all others do.\n\n"+
		"| Case | Why |\n|---|---|\n", casesCount, len(conform.Differ))
	for _, name := range slices.Sorted(maps.Keys(conform.Differ)) {
		fmt.Fprintf(&b, "| %s | %s |\n", name, conform.Differ[name])
	}
	return []byte(b.String())
}

func number(v kmip.ProtocolVersion) string {
	return fmt.Sprintf("%d.%d", v.ProtocolVersionMajor, v.ProtocolVersionMinor)
}

func yes(may bool) string {
	if may {
		return "yes"
	}
	return ""
}
