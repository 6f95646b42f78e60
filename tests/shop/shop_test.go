package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"forkd.dev/forkd/tests/shop/internal/client"
	"forkd.dev/forkd/tests/shop/internal/serve"
	"forkd.dev/forkd/tests/shop/internal/who"
)

// shop runs every service on the loopback and gives their addresses. cart says that it is on a laptop.
func shop(t *testing.T) map[string]string {
	t.Helper()
	addrs := map[string]string{}
	start := func(role string, children map[string]string) {
		where := "cluster"
		if role == "cart" {
			where = "laptop"
		}
		listen := []string{"127.0.0.1:0"}
		if role == "queue" {
			listen = append(listen, "127.0.0.1:0")
		}
		s, err := serve.Start(serve.Config{
			Role: role, Listen: listen, Children: children,
			Self: who.Self{Version: "v1", Pod: role + "-0", Where: where},
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			s.Stop(ctx)
		})
		addrs[role] = s.Addrs[0]
		if len(s.Addrs) > 1 {
			addrs[role+"-first"] = s.Addrs[1]
		}
	}
	start("ledger", nil)
	start("stock", map[string]string{"ledger": "http://" + addrs["ledger"]})
	start("price", nil)
	start("cart", map[string]string{"price": "grpc://" + addrs["price"], "stock": "http://" + addrs["stock"]})
	start("web", map[string]string{"cart": "h2c://" + addrs["cart"]})
	start("queue", nil)
	start("clock", nil)
	return addrs
}

// ask runs `shop client` and gives what it printed, in the order of asking.
func ask(t *testing.T, arguments ...string) []client.Line {
	t.Helper()
	var out bytes.Buffer
	if err := client.Main(arguments, &out); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	var lines []client.Line
	for decoder := json.NewDecoder(&out); decoder.More(); {
		var line client.Line
		if err := decoder.Decode(&line); err != nil {
			t.Fatal(err)
		}
		lines = append(lines, line)
	}
	slices.SortFunc(lines, func(a, b client.Line) int { return a.Ask - b.Ask })
	return lines
}

func outline(a who.Answer) string {
	var calls []string
	for _, call := range a.Calls {
		calls = append(calls, outline(call))
	}
	return fmt.Sprintf("%s@%s %s %q [%s]", a.Service, a.Where, a.Via, a.Key, strings.Join(calls, " "))
}

func TestTheTreeSaysWhoAnsweredAndWhereTheKeyIsLost(t *testing.T) {
	addrs := shop(t)
	got := outline(*ask(t, "http1", "--addr", addrs["web"], "--key", "alice")[0].Answer)
	want := `web@cluster HTTP/1.1 "alice" [cart@laptop HTTP/2.0 "alice" [` +
		`price@cluster gRPC "alice" [] stock@cluster HTTP/1.1 "alice" [ledger@cluster HTTP/1.1 "" []]]]`
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestABrowserGetsAPage(t *testing.T) {
	req, _ := http.NewRequest("GET", "http://"+shop(t)["web"], nil)
	req.Header.Set("Accept", "text/html,*/*;q=0.8")
	req.Header.Set("Baggage", "forkd=<i>")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	page, _ := io.ReadAll(resp.Body)
	for _, want := range []string{"fork &lt;i&gt;", "<b>ledger</b>", `class="box laptop"`} {
		if !strings.Contains(string(page), want) {
			t.Errorf("the page has no %s: %s", want, page)
		}
	}
}

func TestADeadServiceShowsUpInTheTree(t *testing.T) {
	s, err := serve.Start(serve.Config{
		Role: "cart", Listen: []string{"127.0.0.1:0"},
		Children: map[string]string{"price": "grpc://127.0.0.1:1", "stock": "http://127.0.0.1:1"},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Stop(context.Background())
	for _, call := range ask(t, "http1", "--addr", s.Addrs[0])[0].Answer.Calls {
		if !strings.Contains(call.Error, "refused") {
			t.Errorf("%s: error %q", call.Service, call.Error)
		}
	}
}

func TestOneConnectionMixesKeys(t *testing.T) {
	addrs := shop(t)
	for kind, addr := range map[string]string{"http1": addrs["cart"], "h2c": addrs["cart"], "grpc": addrs["price"]} {
		lines := ask(t, kind, "--addr", addr, "--mixed", "alice,bob,-", "--n", "9", "--keepalive")
		if len(lines) != 9 {
			t.Errorf("%s: %d lines", kind, len(lines))
		}
		for _, line := range lines {
			if line.Answer.Key != line.Key {
				t.Errorf("%s: sent key %q, the service saw %q", kind, line.Key, line.Answer.Key)
			}
			if line.Conn != lines[0].Conn {
				t.Errorf("%s: not one connection: %s and %s", kind, lines[0].Conn, line.Conn)
			}
		}
	}
}

func TestEveryProtocolEchoesAndSaysWhoAnswered(t *testing.T) {
	addrs := shop(t)
	for _, c := range []struct{ kind, to, who string }{
		{"ws", "cart", "cart"},
		{"grpc-chat", "price", "price"},
		{"tcp", "queue-first", "queue"},
		{"tcp-greets", "queue", "queue"},
		{"udp", "clock", "clock"},
	} {
		line := ask(t, c.kind, "--addr", addrs[c.to], "--n", "3", "--bytes", "5000", "--key", "bob")[0]
		if line.Answer.Service != c.who || line.Messages != 3 || !*line.Same {
			t.Errorf("%s: %+v", c.kind, line)
		}
	}
	if line := ask(t, "grpc-stream", "--addr", addrs["price"], "--n", "4", "--ms", "1")[0]; line.Messages != 4 {
		t.Errorf("the stream had %d messages", line.Messages)
	}
	if line := ask(t, "grpc-chat", "--addr", addrs["price"], "--n", "3")[0]; line.Trailers["shop-count"] != "3" {
		t.Errorf("trailers %v", line.Trailers)
	}
	if line := ask(t, "grpc-health", "--addr", addrs["price"])[0]; string(line.Body) != `"SERVING"` {
		t.Errorf("health is %s", line.Body)
	}
}

func TestTCPEndsAsItsPeerEndsIt(t *testing.T) {
	addrs := shop(t)
	if line := ask(t, "tcp-halfclose", "--addr", addrs["queue-first"], "--bytes", "3000000")[0]; !*line.Same {
		t.Errorf("after the half-close %d bytes came back", line.Bytes)
	}
	if line := ask(t, "tcp-reset", "--addr", addrs["queue-first"])[0]; line.Errno != "ECONNRESET" {
		t.Errorf("errno %q", line.Errno)
	}
	ask(t, "connect", "--addr", addrs["queue"])

	var out bytes.Buffer
	if client.Main([]string{"connect", "--addr", "127.0.0.1:1"}, &out) == nil || !strings.Contains(out.String(), `"errno":"ECONNREFUSED"`) {
		t.Errorf("a refused connect printed %s", out.String())
	}
}

func TestTheEchoHasTheBodyTheTrailersAndTheContinue(t *testing.T) {
	addr := shop(t)["stock"]
	for _, kind := range []string{"http1", "h2c"} {
		line := ask(t, kind, "--addr", addr, "--path", "/echo", "--bytes", "3000000", "--trailer", "X-Sum: 42", "--expect-continue")[0]
		if !*line.Same || line.Trailers["x-sum"] != "42" || !line.Continued {
			t.Errorf("%s: %+v", kind, line)
		}
	}
	line := ask(t, "http1", "--addr", addr, "--path", "/status/417", "--bytes", "10", "--expect-continue")[0]
	if line.Status != 417 || line.Continued {
		t.Errorf("a refused expectation: %+v", line)
	}
}

func TestTheEchoAnswersWhileItIsAsked(t *testing.T) {
	body, send := io.Pipe()
	req, _ := http.NewRequest("POST", "http://"+shop(t)["web"]+"/echo", body)
	got := make(chan *http.Response, 1)
	go func() {
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Error(err)
		}
		got <- resp
	}()
	io.WriteString(send, "one\n")
	resp := <-got
	defer resp.Body.Close()
	answers := bufio.NewReader(resp.Body)
	for _, line := range []string{"one\n", "two\n"} {
		if line == "two\n" {
			io.WriteString(send, line)
		}
		if echo, err := answers.ReadString('\n'); echo != line {
			t.Fatalf("echo %q, %v", echo, err)
		}
	}
	send.Close()
}

func TestHeadersComeBackAsTheyWereSent(t *testing.T) {
	conn, err := net.Dial("tcp", shop(t)["web"])
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"+
		"GET /headers HTTP/1.1\r\nX-b: 1\r\nhost: x\r\nx-A: 2\r\nX-b: 3\r\nconnection: close\r\n\r\n")
	in := bufio.NewReader(conn)
	first, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, first.Body)
	second, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	var got struct{ Headers [][2]string }
	if err := json.NewDecoder(second.Body).Decode(&got); err != nil {
		t.Fatal(err)
	}
	want := [][2]string{{"X-b", "1"}, {"host", "x"}, {"x-A", "2"}, {"X-b", "3"}, {"connection", "close"}}
	if !slices.Equal(got.Headers, want) {
		t.Errorf("got %v", got.Headers)
	}
}

func TestAStreamArrivesAsItIsSent(t *testing.T) {
	line := ask(t, "http1", "--addr", shop(t)["web"], "--path", "/stream?n=3&ms=40")[0]
	if line.Ms-line.FirstMs < 75 {
		t.Errorf("the first byte came after %v ms, the last after %v ms", line.FirstMs, line.Ms)
	}
}

func TestSmallEndpointsDoWhatTheirNamesSay(t *testing.T) {
	addr := shop(t)["web"]
	t.Setenv("SHOP_SECRET", "s3cret")
	for path, check := range map[string]func(client.Line) bool{
		"/healthz":              func(l client.Line) bool { return l.Status == 200 },
		"/env?name=SHOP_SECRET": func(l client.Line) bool { return string(l.Body) == `"s3cret"` },
		"/env?name=NOT_SET":     func(l client.Line) bool { return l.Status == 404 },
		"/bytes?n=100001":       func(l client.Line) bool { return l.Bytes == 100001 },
		"/status/503":           func(l client.Line) bool { return l.Status == 503 },
		"/status/204":           func(l client.Line) bool { return l.Status == 204 },
		"/slow?ms=20":           func(l client.Line) bool { return l.Ms >= 20 },
	} {
		if line := ask(t, "http1", "--addr", addr, "--path", path)[0]; !check(line) || line.Answer.Service != "web" {
			t.Errorf("%s: %+v", path, line)
		}
	}
	ask(t, "http1", "--addr", addr, "--path", "/healthz", "--header", "User-Agent: kube-probe/1.35")
	if line := ask(t, "http1", "--addr", addr, "--path", "/stats")[0]; !bytes.Contains(line.Body, []byte(`"probes":1`)) {
		t.Errorf("stats %s", line.Body)
	}
}
