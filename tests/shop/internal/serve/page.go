package serve

import (
	_ "embed"
	"html/template"
	"net/http"

	"forkd.dev/forkd/tests/shop/internal/who"
)

//go:embed page.html
var pageText string

var page = template.Must(template.New("page").Parse(pageText))

func writePage(w http.ResponseWriter, answer who.Answer) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	page.Execute(w, answer)
}
