// Package api is the one contract of Strongroom: protobuf files in
// strongroom/v1, served with Connect, from which the Go code beside them is
// generated. Users, the CLI, controllers and hosts all speak it.
package api

//go:generate go tool -modfile=../tools/go.mod buf generate
