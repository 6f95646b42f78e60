package who

import "testing"

func TestTheKeyIsAMemberOfTheBaggageList(t *testing.T) {
	for header, want := range map[string]string{
		"":                                 "",
		"forkd=alice":                      "alice",
		"user=1, forkd = alice;ttl=3 ,x=y": "alice",
		"notforkd=eve":                     "",
		"x=1;forkd=eve":                    "",
		"forkd=a%20b":                      "a b",
		"forkd=first,forkd=second":         "first",
		"forkd":                            "",
	} {
		if got := (Carriers{"baggage": {header}}).Key(); got != want {
			t.Errorf("key of %q is %q, want %q", header, got, want)
		}
	}
	if got := (Carriers{"baggage": {"x=1", "forkd=bob"}}).Key(); got != "bob" {
		t.Errorf("key over two header lines is %q, want bob", got)
	}
}
