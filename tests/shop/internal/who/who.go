// Package who says who answered a request and which fork the request belongs to.
package who

import (
	"net/url"
	"strings"
)

// Answer is one service's part in answering a request. Calls are the services it asked in turn.
type Answer struct {
	Service string   `json:"service"`
	Version string   `json:"version"`
	Pod     string   `json:"pod"`
	Where   string   `json:"where"`
	Via     string   `json:"via"` // the protocol the request came in by
	Key     string   `json:"key"` // the fork key in the baggage that was seen, or ""
	Error   string   `json:"error,omitempty"`
	Calls   []Answer `json:"calls,omitempty"`
}

// Self is what a process knows about itself.
type Self struct {
	Service string
	Version string
	Pod     string
	Where   string
}

// Answer is the answer of this process to a request without calls of its own.
func (s Self) Answer(via, key string) Answer {
	return Answer{Service: s.Service, Version: s.Version, Pod: s.Pod, Where: s.Where, Via: via, Key: key}
}

// CarrierNames are the headers, or gRPC metadata, that may tell which fork a request belongs to.
var CarrierNames = []string{"baggage", "tracestate", "traceparent", "x-forkd-id"}

// Carriers are the values of a request's carrier headers, by lower-case name.
type Carriers map[string][]string

// Read takes the carriers out of a request. values returns all values of a header.
func Read(values func(name string) []string) Carriers {
	c := Carriers{}
	for _, name := range CarrierNames {
		if v := values(name); len(v) > 0 {
			c[name] = v
		}
	}
	return c
}

// Only keeps the carriers with the given names.
func (c Carriers) Only(names []string) Carriers {
	kept := Carriers{}
	for _, name := range names {
		if v, ok := c[name]; ok {
			kept[name] = v
		}
	}
	return kept
}

// Carry is the carrier header by which a test sends a fork key.
func Carry(name, key string) Carriers {
	switch {
	case key == "":
		return nil
	case name == "x-forkd-id":
		return Carriers{name: {key}}
	default:
		return Carriers{name: {"forkd=" + key}}
	}
}

// Key is the value of the baggage member "forkd", or "".
//
// The list, its properties and the percent-encoding are those of W3C Baggage, section 3.2.
func (c Carriers) Key() string {
	for member := range strings.SplitSeq(strings.Join(c["baggage"], ","), ",") {
		pair, _, _ := strings.Cut(member, ";")
		name, value, found := strings.Cut(pair, "=")
		if !found || strings.TrimSpace(name) != "forkd" {
			continue
		}
		value = strings.TrimSpace(value)
		if decoded, err := url.PathUnescape(value); err == nil {
			return decoded
		}
		return value
	}
	return ""
}
