{{/* The prefix of the objects' names. */}}
{{- define "domicile.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The operator's name: of its Deployment, roles and Service. */}}
{{- define "domicile.operator" -}}
{{- printf "%s-operator" (include "domicile.fullname" .) -}}
{{- end -}}

{{/* What selects the operator's pods. It can't change once a Deployment exists. */}}
{{- define "domicile.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: operator
{{- end -}}

{{/* The labels of every object of the operator. */}}
{{- define "domicile.labels" -}}
{{ include "domicile.selector" . }}
{{ include "domicile.release" . }}
{{- end -}}

{{/* The labels of every object of the release. */}}
{{- define "domicile.release" -}}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{/* The operator's ServiceAccount. */}}
{{- define "domicile.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "domicile.operator" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* The image: what the operator runs, and what store pods take the instance manager from. */}}
{{- define "domicile.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}
